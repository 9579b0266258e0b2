"""The report's style sheet and the frame of its page."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --edge: #e3e3dd; --grid: #ecece7;
  --ink: #1b1f24; --soft: #5c6470; --code: #f4f4f0;
  --train: #0f766e; --eval: #b4490f; --before: #7a828e;
  --good: #17703d; --good-bg: #dff3e5; --bad: #8f2f2b; --bad-bg: #f8e3e1; --mid: #7a5300;
    --mid-bg: #f8ecd0;
  --shadow: 0 1px 2px rgb(20 24 30 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1214; --card: #171b1f; --edge: #2a3036; --grid: #252b31;
    --ink: #e7eaed; --soft: #9aa4af; --code: #1f252a;
    --train: #4fd1c1; --eval: #f4a261; --before: #8b95a1;
    --good: #86dca5; --good-bg: #16331f; --bad: #f2a8a3; --bad-bg: #3a1e1d; --mid: #ecc878;
      --mid-bg: #362b12;
    --shadow: none;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, h3 { line-height: 1.2; margin: 0; letter-spacing: -.01em; text-wrap: balance; }
h1 { font-size: 30px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 4px; }
h3 { font-size: 14px; letter-spacing: 0; }
p { margin: 0; max-width: 75ch; }
.soft, .lead { color: var(--soft); }
.lead { margin-bottom: 16px; }
header .line { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px;
  margin-bottom: 6px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 14px; }
a { color: var(--train); text-underline-offset: 3px; }
:focus-visible { outline: 2px solid var(--train); outline-offset: 2px; border-radius: 4px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 12px;
  padding: 16px 18px;
  box-shadow: var(--shadow); min-width: 0; }
.grid { display: grid; gap: 14px; }
.tiles { display: flex; flex-wrap: wrap; margin-top: 26px; } .tile { flex: 1 1 170px; }
.tile .name { font-size: 13px; color: var(--soft); }
.tile .value { white-space: nowrap; font-size: 24px; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tile .value small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile .note { font-size: 13px; color: var(--soft); }
.tile.main { border-color: var(--eval); }
.tile.main { flex: 2 1 320px; } .tile.main .value { font-size: 34px; }
.tile.main .value { color: var(--eval); }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.three { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.head { display: flex; justify-content: space-between; gap: 12px; align-items: baseline; }
.head .value { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
.head .value small { color: var(--soft); font-weight: 400; font-size: 12px; }
figure { margin: 0; display: flex; flex-direction: column; }
figcaption p { font-size: 12.5px; color: var(--soft); line-height: 1.4; }
figcaption { margin-bottom: 8px; }
.chart { display: block; width: 100%; height: auto; margin-top: auto; overflow: visible; }
.train { --color: var(--train); } .eval { --color: var(--eval); }
.chart text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--grid); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.chart .faint { stroke-width: 1.2; opacity: .35; }
.chart .band { fill: var(--color); opacity: .16; }
.chart .whisker { stroke: var(--color); stroke-width: 5; opacity: .22; stroke-linecap: round; }
.chart .dot { fill: var(--color); stroke: var(--card); stroke-width: 1.5; }
.hit rect { fill: transparent; }
.hit .guide, .hit circle, .hit text { opacity: 0; pointer-events: none; }
.hit:hover .guide, .hit:hover circle, .hit:hover text { opacity: 1; }
.hit .guide { stroke: var(--soft); stroke-dasharray: 2 3; } .hit circle { fill: var(--color); }
.chart .hit text { fill: var(--ink); font-weight: 600; }
.ranges { display: grid; grid-template-columns: minmax(64px, auto) minmax(90px, 1fr) auto;
  gap: 14px;
  align-items: center; margin-top: 14px; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.ranges svg { width: 100%; height: 30px; display: block; overflow: visible; }
.ranges .rail { stroke: var(--grid); stroke-width: 2; } .ranges line { stroke-linecap: round; }
.ranges .b { stroke: var(--before); } .ranges .a { stroke: var(--eval); }
.ranges .span { stroke-width: 6; opacity: .3; } .ranges circle.b { fill: var(--before); }
.ranges circle.a { fill: var(--eval); } .ranges circle { stroke: var(--card); stroke-width: 1.5; }
.ranges .numbers { text-align: right; white-space: nowrap; }
.ranges .ends { display: flex; justify-content: space-between; font-size: 12px; margin-top: -8px; }
.lanes .head { flex-wrap: wrap; } .ask + .side { margin-top: 8px; }
.lanes, .grid + .grid, .grid + .more { margin-top: 14px; } .small { font-size: 13px; }
.prefix { display: flex; gap: 10px; align-items: baseline; margin-top: 4px; font-size: 13px; }
.prefix span { flex: none; }
.key { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  background: var(--before); }
.key.a { background: var(--eval); }
.pill { display: inline-block; border-radius: 99px; padding: 1px 9px; font-size: 12.5px;
  font-weight: 600;
  white-space: nowrap; font-variant-numeric: tabular-nums; background: var(--code);
    color: var(--soft); }
.pill.good { background: var(--good-bg); color: var(--good); }
.pill.bad { background: var(--bad-bg); color: var(--bad); }
.pill.mid { background: var(--mid-bg); color: var(--mid); }
.warn { color: var(--bad); font-weight: 600; }
pre { margin: 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono",
  monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 18em; overflow: auto; }
.question { margin-top: 14px; }
.question .ask { background: var(--code); border-radius: 8px; padding: 10px 12px; }
.question .meta { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px;
  color: var(--soft);
  margin-bottom: 8px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: 4px 28px;
  margin-top: 12px; }
.side h3 { color: var(--soft); font-weight: 600; display: flex; gap: 8px; align-items: center;
  margin-bottom: 4px; }
.answer { display: grid; grid-template-columns: 1fr auto; gap: 12px; align-items: start;
  padding: 6px 0;
  border-top: 1px solid var(--grid); }
.answer .score { display: flex; gap: 10px; align-items: baseline; font-size: 12.5px;
  font-variant-numeric: tabular-nums; }
details summary { cursor: pointer; font-weight: 600; }
details.more { margin-top: 14px; } details.more > .grid { margin-top: 14px; }
.settings { columns: 2 420px; column-gap: 28px; }
.settings table { width: 100%; border-collapse: collapse; break-inside: avoid; margin-bottom: 18px;
  font-size: 13.5px; }
.settings caption { text-align: left; font-weight: 600; padding: 4px 0; }
.settings th { font-weight: 400; color: var(--soft); text-align: left; width: 48%;
  vertical-align: top; }
.settings th, .settings td { padding: 4px 8px 4px 0; border-top: 1px solid var(--grid);
  overflow-wrap: anywhere; }
footer { margin-top: 48px; font-size: 13px; color: var(--soft); }
@media (max-width: 620px) {
  main { padding: 24px 14px 48px; } h1 { font-size: 24px; }
  .wide .chart text { font-size: 17px; } .wide .axis { display: none; }
  .ranges { grid-template-columns: 1fr auto; gap: 2px 14px; }
  .ranges > :nth-child(3n + 1) { grid-column: 1 / -1; margin-top: 8px; }
  .ranges .ends { margin-top: 0; }
}
@media print { .card { break-inside: avoid; box-shadow: none; } nav { display: none; }
pre { max-height: none; } }
"""

"""Every experiment in its small size: the command runs, and its results are in order."""

import json
import os
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers
from test_families import FAMILIES, SHAPE, random_model
from test_gguf_families import CHANGES, write
from test_models_load import small_bpe

ROOT = Path(__file__).parents[2]
QUICK = os.environ["GVPO_TESTS_XLA_FLAGS"]  # one device, little of LLVM: where nothing is timed
pytestmark = pytest.mark.slow


def run(script, *arguments, file="run.py", XLA_FLAGS=QUICK):
    command = [sys.executable, str(ROOT / "experiments" / script / file), "--small"]
    subprocess.run(
        [*command, *map(str, arguments)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
    )


def test_shared_prefix(tmp_path):
    run("shared_prefix", "--rounds", 3, "--out", tmp_path / "results.json", XLA_FLAGS="")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["gradient_difference"] < 1e-5
    assert row["memory_ratio"] > 1.5
    assert row["speedup"] > 1


def test_decode_step(tmp_path):
    run("decode_step", "--rounds", 1, "--out", tmp_path / "results.json", XLA_FLAGS="")
    milliseconds = json.loads((tmp_path / "results.json").read_text())["ms"]
    assert milliseconds["gvpo-jax"]["median"] < milliseconds["transformers"]["median"]


def test_lora_decode(tmp_path):
    run("lora_decode", "--ranks", 4, "--rounds", 1, "--out", tmp_path / "results.json")
    times = json.loads((tmp_path / "results.json").read_text())["ms"]["4"]
    assert times.keys() == {"merged", "apart", "merge"}
    assert times["merge"]["median"] > 0


def test_parts_of_an_update_by_the_tpu_compilers_clock(tmp_path):
    run("tpu_compile", "--out", tmp_path / "parts.json", file="parts.py")
    saved = json.loads((ROOT / "experiments" / "tpu_compile" / "parts.json").read_text())["rows"]
    small = json.loads((tmp_path / "parts.json").read_text())["rows"]
    ways = [{(row["part"], row["way"]) for row in rows} for rows in (saved, small)]
    assert ways[0] == ways[1]
    assert all(row["ms"] > 0 for row in [*saved, *small])
    kernels = {row["way"] for row in small if row["of these kernels, by a model"]}
    assert kernels == {"splash"}


def test_tpu_peers(tmp_path):
    run("tpu_peers", "--out", tmp_path / "results.json")
    (rows,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert set(rows) == {"ours", "Tunix"}
    for row in rows.values():
        assert row["ms"] == pytest.approx(sum(row["parts, ms"].values()))
        assert 0 < row["mfu"] < 1
    page = ROOT / "experiments" / "tpu_peers"
    ours = json.loads((page / "results.json").read_text())["colab"]["ours"]["ms"]
    assert f"| colab | ours | {ours:.1f} |" in (page / "README.md").read_text()


def test_parity(tmp_path):
    run("parity", "--out", tmp_path / "results.json")
    (family,) = json.loads((tmp_path / "results.json").read_text())["families"].values()
    assert set(family) == {"logits", "log-probs", "gradients", "sampler's log-probs"}
    assert all(0 <= apart < 1e-4 for apart in family.values())


def test_quickstart(tmp_path):
    run("quickstart", "--config", "debug", "--seeds", 0, 1, "--runs", tmp_path, "--out", tmp_path)
    seeds = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert [s["steps"] for s in seeds.values()] == [2, 2]
    shown = "".join(ElementTree.parse(tmp_path / "curves.svg").getroot().itertext())
    assert "Training reward" in shown
    assert "mean of 2 runs" in shown


def test_optimum(tmp_path):
    """GVPO ends at pi*, whoever samples; where it can't, or another loss is used, it does not."""
    run("optimum", "--out", tmp_path)
    small = json.loads((tmp_path / "results.json").read_text())
    worst = {name: row["worst"] for name, row in small["conditions"].items()}
    assert worst["on-policy"] < 1e-10
    assert worst["offline, from the reference"] < 1e-12
    assert worst["4 on-policy + 4 uniform"] < 1e-12
    for name in ("demonstrations only", "sampled with top-p 0.8", "GVPO, weights not stopped"):
        assert worst[name] > 0.1
    assert worst["Dr. GRPO + k3 KL"] > 0.02
    own = {name: row["own_kl"] for name, row in small["conditions"].items() if "own_kl" in row}
    assert max(own["demonstrations only"] + own["GVPO, weights not stopped"]) < 1e-12
    assert max(own["Dr. GRPO + k3 KL"]) < 5e-3
    assert max(row["worst"] for row in small["previous"]) < 1e-9
    ElementTree.parse(tmp_path / "optimum.svg")

    saved = json.loads((ROOT / "experiments" / "optimum" / "results.json").read_text())
    for row in saved["conditions"].values():
        if row["kind"] in ("samples", "variant"):
            assert row["worst"] < 1e-6
        elif row["kind"] == "support cut":
            assert row["worst"] > 0.1


def test_kv_cache(tmp_path):
    run("kv_cache", "--out", tmp_path / "results.json")
    off = json.loads((tmp_path / "results.json").read_text())["nats_off"]
    assert off["float32"]["token_max"] < 1e-4
    assert off["float32"]["token_mean"] < off["bfloat16"]["token_mean"] < off["int8"]["token_mean"]


def test_quantized_base(tmp_path):
    """Fewer bits are further away, and in the saved results larger tiles are, too."""
    run("quantized_base", "--out", tmp_path / "results.json")
    saved = ROOT / "experiments" / "quantized_base" / "results.json"
    for file in (tmp_path / "results.json", saved):
        rows = json.loads(file.read_text())["rows"]
        kl = {kind: [r["kl_mean"] for r in rows if r["kind"] == kind] for kind in ("int8", "nf4")}
        assert 0 < max(kl["int8"]) < min(kl["nf4"]) / 10
        assert kl["nf4"] == sorted(kl["nf4"])
        sizes = {(r["kind"], r["tile"]): r["bits_per_weight"] for r in rows}
        assert sizes["nf4", 64] == 4 + 32 / 64


def test_gemma3_270m(tmp_path):
    sizes = {"vocab_size": len(small_bpe()[0]), "max_position_embeddings": 256}
    values = SHAPE | FAMILIES["gemma3_text"] | CHANGES["gemma3_text"] | sizes
    model = random_model(transformers.AutoConfig.for_model("gemma3_text", **values))
    write(tmp_path / "x.gguf", model)
    model.config.save_pretrained(tmp_path)
    out = tmp_path / "out.json"
    run("gemma3_270m", tmp_path, "--out", out)
    (row,) = json.loads(out.read_text())["texts"]
    assert row["tokens"] > 5
    assert row["logits"] < 1e-4
    assert row["log_probs"] < 1e-4
    assert row["same_ids"]
    assert row["same_greedy"]


def test_bench(tmp_path):
    """Ours, plain PyTorch, TRL and Tunix at the same small work; that it is the same is checked."""
    bench = [sys.executable, str(ROOT / "experiments" / "bench" / "run.py")]
    options = ["--only", "small", "--rounds", "1", "--out", str(tmp_path / "results.json")]
    subprocess.run([*bench, *options], check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK})
    results = json.loads((tmp_path / "results.json").read_text())
    for task, contestants in (("train", 4), ("rollout", 3)):
        rows = results[f"small/{task}/cpu"]["contestants"]
        assert len(rows) == contestants
        assert all(row["tokens_per_second"] > 0 for row in rows.values()), rows
    picture = (tmp_path / "results.svg").read_text()
    assert "small" in "".join(ElementTree.fromstring(picture).itertext())


def test_bench_variants(tmp_path):
    """What is meant for a GPU, on a CPU: each way is timed, and XLA's counts stand beside it."""
    script = ROOT / "experiments" / "bench" / "variants.py"
    out = tmp_path / "variants.json"
    ways = ("rollout", "as it is", "logits in blocks of the vocabulary")
    only = [x for way in ways for x in ("--only", way)]
    command = [sys.executable, str(script), "--workload", "small", "--rounds", "1", "--out", out]
    subprocess.run([*command, *only], check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK})
    rows = json.loads(out.read_text())["rows"]
    assert tuple(rows) == ways
    assert all(row["ms"] > 0 for row in rows.values()), rows
    assert all(rows[way]["counted"]["flops"] > 0 for way in ways[1:])


def test_soak(tmp_path):
    """Nothing is opened, started or compiled any more in the second half of the saved run."""
    run("soak", "--out", tmp_path / "results.json")
    small = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((ROOT / "experiments" / "soak" / "results.json").read_text())
    for results in (small, saved):
        assert results["rows"][-1]["update"] == results["updates"]
        assert len(results["rows"]) > 20
    for what in ("files", "threads", "programs"):
        assert saved["slopes"][what] == [0, 0, 0], what
    assert saved["slopes"]["memory"][2] < 20  # MiB for 1,000 updates
    assert "memory" in (tmp_path / "results.svg").read_text()


def test_saving(tmp_path):
    """A save is handed on before it is written."""
    run("saving", "--out", tmp_path / "results.json")
    small = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((ROOT / "experiments" / "saving" / "results.json").read_text())
    for row in [*small.values(), *saved.values()]:
        assert 0 < row["waits"][0] < row["whole after"][0]
        assert row["beside it"][0] > 0.5
    assert [round(row["GiB"], 1) for row in saved.values()] == [1.5, 5.8]


def test_slow_rewards(tmp_path):
    """A slow judge costs less with lookahead, where training is long, in the saved run."""
    run("slow_rewards", "--out", tmp_path / "results.json")
    small = json.loads((tmp_path / "results.json").read_text())
    saved = json.loads((ROOT / "experiments" / "slow_rewards" / "results.json").read_text())
    assert small["seconds"].keys() == saved["seconds"].keys()
    assert all(times[0] > 0 for times in small["seconds"].values())

    def cost(updates, lookahead):
        name = f"{updates} updates, lookahead {lookahead}"
        fast, slow = (saved["seconds"][f"{name}, {speed} judge"] for speed in ("fast", "slow"))
        return statistics.median(slow) - statistics.median(fast)

    assert cost(1, 0) > 0.5 * saved["delay"]
    assert cost(4, 1) < 0.3 * cost(4, 0)


def test_trace(tmp_path):
    """Most updates are sent to the devices while they are at work on what comes before.

    None would be if the loop waited. All are where nothing else runs (the saved results).
    """
    run("trace", "--out", tmp_path / "results.json", XLA_FLAGS="")
    saved = ROOT / "experiments" / "trace" / "results.json"
    for file, least in ((tmp_path / "results.json", 0.5), (saved, 1)):
        runs = json.loads(file.read_text())["runs"]
        for kind in ("given groups", "sampled groups"):
            pairs = runs[kind]["one to the next"]
            assert pairs["pairs"] >= 5
            assert pairs["sent_while_busy"] >= least * pairs["pairs"]
        assert "over a rollout" in runs["sampled groups"]


def test_gvpo_vs_grpo(tmp_path):
    """A run of each kind; what is finished is not run again; the report has them all."""
    raw = tmp_path / "raw"
    run("gvpo_vs_grpo", "--raw", raw, "--runs", tmp_path / "runs")
    kinds = {path.stem.split("_")[0] for path in raw.iterdir()}
    assert kinds == {"base", "grid", "final", "beta", "penalty", "k", "mix"}
    times = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    run("gvpo_vs_grpo", "--raw", raw, "--runs", tmp_path / "runs")
    assert times == {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    report = [sys.executable, str(ROOT / "experiments" / "gvpo_vs_grpo" / "report.py")]
    subprocess.run([*report, "--raw", raw, "--out", tmp_path], check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {path.stem for path in raw.iterdir()}
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in results.values())
    ElementTree.parse(tmp_path / "sweep.svg")


def test_mutants(tmp_path):
    run("mutants", "--out", tmp_path / "results.json")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    tests = ("tests/unit/test_loss.py::", "tests/unit/test_identities.py::")
    assert [row["caught_by"].startswith(tests) for row in rows] == [True] * 3
    saved = json.loads((ROOT / "experiments" / "mutants" / "results.json").read_text())["rows"]
    page = (ROOT / "experiments" / "mutants" / "README.md").read_text()
    assert len(saved) >= 10
    assert all(f"| {row['name']} |" in page and row["caught_by"] for row in saved)


def test_saved_results_are_those_of_the_readme():
    """The quickstart's promise, on every seed: 25 points, in 10 minutes and 10 GB."""
    saved = json.loads((ROOT / "experiments" / "quickstart" / "results.json").read_text())
    assert len(saved["seeds"]) >= 3
    for summary in saved["seeds"].values():
        assert summary["eval/accuracy_after"] - summary["eval/accuracy_before"] >= 0.25
        assert summary["train_seconds"] <= 600
        assert summary["peak_memory_gib"] * 2**30 <= 10e9


def test_growth(tmp_path):
    """Four times the completions cost about four times as much, and their prompt what it did."""
    run("growth", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    tables = results["updates"]["k"], results["prompts"]
    updates, prompts = ([row["gflops"] for row in table] for table in tables)
    assert 2.5 < updates[1] / updates[0] < 4
    assert prompts[1] < 1.2 * prompts[0]
    ElementTree.parse(tmp_path / "growth.svg")


def test_every_mutant_is_still_a_change_of_one_place():
    mutants = runpy.run_path(str(ROOT / "experiments" / "mutants" / "mutants.py"))["MUTANTS"]
    places = {m.name: (ROOT / "gvpo_jax" / m.file).read_text().count(m.old) for m in mutants}
    assert set(places.values()) == {1}, places

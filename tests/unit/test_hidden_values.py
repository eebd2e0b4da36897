"""Constants that hang on spikes unseen are refused; those that do not pass."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.dlpack
from torch import Tensor

from spikefleet_models.equivalence import check_equivalence
from spikefleet_models.hidden_values import check_hidden_values
from spikefleet_models.slots import NotSpikeDrivenError
from unit.test_spike_rule import Net, images

Way = Callable[[Net, Tensor], Tensor]


def elsewhere(work: Callable[[], object]) -> None:
    """In another thread, whose operations torch shows to nobody."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def through_a_thread(net: Net, s: Tensor) -> Tensor:
    """An average of spikes, written into a buffer."""
    average = torch.zeros(1, dtype=s.dtype)
    elsewhere(lambda: average.copy_(s.mean()))
    return net.conv(s) + average


def through_numpy(net: Net, s: Tensor) -> Tensor:
    average = torch.zeros(1, dtype=s.dtype)
    shared = average.numpy()
    elsewhere(lambda: shared.__setitem__(0, float(s.mean())))
    return net.conv(s) + average


def through_dlpack(net: Net, s: Tensor) -> Tensor:
    average = torch.zeros(1, dtype=s.dtype)
    torch.utils.dlpack.from_dlpack(average).copy_(s.mean())
    return net.conv(s) + average


def through_text(net: Net, s: Tensor) -> Tensor:
    return net.conv(s) + len([digit for digit in str(s.flatten()[:200].to(torch.int8)) if digit == "1"])


def through_weights(net: Net, s: Tensor) -> Tensor:
    elsewhere(lambda: net.second.weight.data.fill_(float(s.mean())))
    return net.second(s)


def through_an_index(net: Net, s: Tensor) -> Tensor:
    first = torch.zeros(1, dtype=torch.int64)
    elsewhere(lambda: first.copy_(s.sum().long() % 4))
    return net.conv(torch.cat((s, s), 1).narrow(1, int(first), 3))


HIDDEN: dict[str, Way] = {
    "thread": through_a_thread,
    "numpy": through_numpy,
    "dlpack": through_dlpack,
    "text": through_text,
    "weights": through_weights,
    "index": through_an_index,
}


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("name", HIDDEN)
def test_constants_that_hang_on_spikes_are_refused(name: str, bound: int) -> None:
    # An average of integers is refused by itself.
    where = "first.neuron .* feeds mean" if (name, bound) == ("dlpack", 4) else "on the way to neuron last.neuron"
    with pytest.raises(NotSpikeDrivenError, match=where):
        check_equivalence(Net(bound, HIDDEN[name]).double(), images())


def test_a_current_of_hidden_constants_alone_is_refused() -> None:
    """No operation on spikes leads to the neuron."""

    def through_text_alone(net: Net, s: Tensor) -> Tensor:
        return net.conv(torch.ones_like(s) * str(s.flatten()[:200].to(torch.int8)).count("1"))

    with pytest.raises(NotSpikeDrivenError, match=r"constant of its input on the way to neuron last\.neuron"):
        check_hidden_values(Net(4, through_text_alone).double().eval(), images(1).double())


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_borders_that_a_layer_copies_are_no_hidden_constants(mode: str) -> None:
    """Circular padding fills memory in which anything stands."""
    net = Net(1, lambda net, s: net.conv(s))
    net.conv.padding_mode = mode  # type: ignore[assignment]
    for _ in range(3):
        torch.full((1, 3, 6, 6), torch.rand(()).item(), dtype=torch.float64)
        assert check_equivalence(net, images()).passed


def noted(net: Net, s: Tensor) -> Tensor:
    brightest = torch.zeros(1, dtype=s.dtype)
    elsewhere(lambda: brightest.copy_(net.kept.amax()))
    return net.conv(s) + brightest + len("constant")


def test_constants_that_stay_as_they_are_pass() -> None:
    assert check_equivalence(Net(4, noted), images()).passed


def test_what_python_reads_of_the_image_alone_passes() -> None:
    class Scaled(Net):
        def forward(self, images: Tensor) -> Tensor:
            y: Tensor = super().forward(images / images.max().item() * len(str(images)) / len(str(images)))
            return y

    assert check_equivalence(Scaled(4, lambda net, s: net.conv(s)), images()).passed


def test_the_sentence_names_the_operation_and_the_neuron() -> None:
    net = Net(4, through_a_thread).double().eval()
    with pytest.raises(
        NotSpikeDrivenError, match=r"number or constant of operation add on the way to neuron last\.neuron"
    ):
        check_hidden_values(net, images(1).double())

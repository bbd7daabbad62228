import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from srlm_utils import sampling


@pytest.mark.parametrize("temperature,top_p", [(1.0, 0.9), (0.7, 0.9), (0.3, 0.5), (1.5, 0.99), (0.7, 1.0)])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0, [0.1, 8.0, 2.0, 0.5]])  # 0.1 is nearly flat: 64 do not hold top_p
def test_nucleus_equals_the_reference_warpers(temperature, top_p, spread):
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)) * torch.tensor(spread).view(-1, 1)
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.clone()))
    expected = warped.softmax(-1)
    probs, ids = sampling.nucleus(logits, temperature, top_p)
    found = torch.zeros_like(expected).scatter_add(-1, ids, probs)
    assert torch.allclose(found, expected, atol=1e-5)


def test_draws_follow_the_nucleus():
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, -9.0]])
    probs, ids = sampling.nucleus(logits, 0.7, 0.9)
    kept = ids[0, probs[0] > 0].tolist()
    u = torch.from_numpy(sampling.uniforms(0, "draws", 20_000).astype(np.float32))
    drawn = sampling.sample(logits.expand(20_000, -1), u, 0.7, 0.9)
    counts = [int((drawn == i).sum()) for i in kept]
    assert sum(counts) == 20_000  # nothing outside the nucleus
    expected = np.array([float(probs[0, ids[0].tolist().index(i)]) for i in kept])
    expected *= 20_000 / expected.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_the_last_uniform_below_one_stays_inside_the_nucleus():
    logits = torch.tensor([[5.0, 4.0, -20.0, -20.0]])
    u = torch.tensor([np.nextafter(np.float32(1), np.float32(0))])
    assert sampling.sample(logits, u, 1.0, 0.9).item() in (0, 1)


def test_rounding_of_the_sum_lets_no_token_outside_the_nucleus_in():
    logits = 2 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    probs, ids = sampling.nucleus(logits, 1.0, 0.9)
    last = torch.full((64,), float(np.nextafter(np.float32(1), np.float32(0))))
    assert bool((probs.cumsum(-1)[:, -1] <= last).any())  # of some rows the kept ones add up to less than the draw
    drawn = sampling.sample(logits, last, 1.0, 0.9)
    assert all(t in i[p > 0] for t, i, p in zip(drawn, ids, probs, strict=True))


def test_the_nucleus_ends_where_its_mass_reaches_top_p():
    probs, _ = sampling.nucleus(torch.zeros(1, 4), 1.0, 0.5)  # a quarter each
    assert probs[0].tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    with pytest.raises(FloatingPointError):
        sampling.sample(torch.tensor([[0.0, bad, 1.0]]), torch.tensor([0.5]), temperature, 0.9)


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 100)
    assert sampling.sample(logits, torch.rand(5), 0, 0.9).tolist() == logits.argmax(-1).tolist()


def test_uniforms_depend_on_seed_and_key_alone():
    assert (sampling.uniforms(1, "a", 5) == sampling.uniforms(1, "a", 9)[:5]).all()
    assert not (sampling.uniforms(1, "a", 5) == sampling.uniforms(1, "b", 5)).any()
    assert not (sampling.uniforms(1, "a", 5) == sampling.uniforms(2, "a", 5)).any()

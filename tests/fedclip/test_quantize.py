"""Roundings: on the stated grid bit for bit, within the stated error, unbiased where they say so, finite whatever comes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.quantize import Entropy, Fp16, Quantize, Sign
from fedclip.sparsify import TopK
from fedclip.transform import UNBOUNDED, Bound, chain, with_error_feedback
from fedclip.update import Codes, Dense, Half, Sparse, block_lengths, decoded, norm, pieces, subtract, to_dense, values_of
from tests.strategies_of_data import bits, context, flat, float64_norm, updates_with_layouts

QUANTIZERS = st.builds(Quantize, st.integers(2, 8), st.sampled_from([1, 2, 3, 32, 256]), st.booleans())
STAGES = st.one_of(QUANTIZERS, st.just(Fp16()), st.just(Sign()), st.builds(Entropy, st.sampled_from([1e-6, 0.1, 1.0, 2.0, 50.0, 1e30])))


def check_grid(update, layout):
    """The promises of `Update.grid`."""
    values, grid = values_of(update), update.grid
    if isinstance(grid, Half):
        assert torch.equal(values.half().float(), values)
        return
    assert isinstance(grid, Codes)
    lengths = block_lengths(update, layout, grid.block)
    assert (grid.codes.dtype, grid.scales.dtype) == (torch.int8, torch.float32)
    assert (grid.codes.shape, grid.scales.shape) == (values.shape, (len(lengths),))
    assert sum(lengths) == values.numel()
    assert bits(decoded(grid.codes, grid.scales, lengths)) == bits(values)
    assert 1 <= grid.bits <= 8
    if grid.bits == 1:
        assert bool((grid.codes.abs() == 1).all())
    else:
        assert bool((grid.codes.abs() <= 2 ** (grid.bits - 1) - 1).all())
    assert torch.isfinite(grid.scales).all()


@given(updates_with_layouts(), STAGES)
def test_values_lie_on_the_grid_and_the_error_is_measured(case, stage):
    layout, update = case
    before = bits(values_of(update))
    step = stage.apply(update, None, context(layout))
    check_grid(step.update, layout)
    assert bits(values_of(update)) == before, "the input was changed"
    assert torch.isfinite(values_of(step.update)).all()
    error = float64_norm(subtract(update, step.update, layout).vector) / (float64_norm(values_of(update)) or 1.0)
    assert step.measurements["compression_error"] == pytest.approx(error, rel=1e-5, abs=1e-7)
    assert stage.bound(Bound(2.0, (1.0,)), layout) == Bound(2.0, (1.0,))
    if isinstance(stage, Entropy):
        assert step.measurements["density"] == values_of(step.update).numel() / layout.size
    else:
        assert type(step.update) is type(update)
        assert values_of(step.update).shape == values_of(update).shape


@given(updates_with_layouts(), QUANTIZERS)
def test_a_quantised_value_is_within_a_step_of_its_block(case, stage):
    layout, update = case
    out, top = stage.apply(update, None, context(layout)).update, 2 ** (stage.bits - 1) - 1
    values, start = values_of(update).double(), 0
    for length in block_lengths(update, layout, stage.block):
        was, now = values[start : start + length], values_of(out)[start : start + length].double()
        # The scale as float32 is off by half a unit in the last place, or among subnormal numbers by 1.4e-45; so is the product.
        exact = float(was.abs().amax()) / top
        step = exact * (1 + 1e-6) + 2.8e-45
        if exact < 2e36:
            assert float((was - now).abs().amax()) <= (step if stage.stochastic else step / 2) + top * (exact * 1e-6 + 1.5e-45)
        else:  # 127 scales may exceed the largest float32 number, so that the code is one nearer to 0.
            assert float((was - now).abs().amax()) <= 1.01 * step
        start += length


def test_known_codes():
    x = torch.tensor([1.0, -0.5, 0.25, 127.0, 0.0, 3.0, -4.0])
    out = Quantize(8, 4, stochastic=False).apply(Dense(x), None, context(flat(7))).update
    assert out.grid.scales.tolist() == [1.0, pytest.approx(4 / 127)]
    assert out.grid.codes.tolist() == [1, 0, 0, 127, 0, 95, -127], "ties to even, and -128 never"
    out = Quantize(4, 8, stochastic=False).apply(Dense(torch.tensor([7.0, -7.0, 3.4, -3.6])), None, context(flat(4))).update
    assert out.vector.tolist() == [7.0, -7.0, 3.0, -4.0]


def test_blocks_do_not_straddle_tensors():
    x = torch.tensor([1000.0, 1.0, 1.0, 0.001, 0.002, 5.0])
    out = Quantize(8, 32, stochastic=False).apply(Dense(x), None, context(flat(1, 2, 0, 2, 1))).update
    assert out.grid.scales.numel() == 4
    assert torch.allclose(out.vector, x, rtol=1e-2)


def test_a_block_of_a_sparse_update_holds_stored_values():
    layout = flat(100, 100)
    update = Sparse(torch.tensor([3, 50, 99, 150]), torch.tensor([1.0, -2.0, 4.0, 8.0]))
    out = Quantize(8, 2, stochastic=False).apply(update, None, context(layout)).update
    assert torch.equal(out.indices, update.indices)
    assert out.grid.scales.tolist() == pytest.approx([2 / 127, 4 / 127, 8 / 127])


@pytest.mark.parametrize("stage", [Quantize(8), Quantize(4), Quantize(2, 5)])
def test_stochastic_rounding_is_unbiased(stage):
    layout = flat(5, 3)
    x = torch.tensor([0.013, -0.2, 0.77, 1.0, -1.0, 0.0, 3.3, 7.0])
    rng = context(layout)
    draws = torch.stack([stage.apply(Dense(x), None, rng).update.vector for _ in range(20_000)]).double()
    steps = torch.cat([torch.full((5,), 1.0), torch.full((3,), 7.0)]) / (2 ** (stage.bits - 1) - 1)
    # The deviation of one draw is at most half a step.
    assert bool(((draws.mean(0) - x.double()).abs() <= 5 * steps / 2 / math.sqrt(20_000) + 1e-6).all())
    assert bool((draws[:, 5] == 0).all())


def test_numbers_on_the_grid_stay_whatever_the_coin():
    x = torch.tensor([127.0, 5.0, -64.0, -126.0, 0.0])
    for seed in range(200):
        assert torch.equal(Quantize().apply(Dense(x), None, context(flat(5), seed=seed)).update.vector, x)


def test_coins_come_from_the_users_stream():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    first, again, other = (bits(Quantize(4).apply(Dense(x), None, context(flat(1000), seed=s)).update.vector) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("stage", "low", "high"),
    [
        # Uniform errors: a step is max / 127 = about 2.1 / 127 in a block of 32 normal numbers; nearest s / sqrt 12, stochastic s / sqrt 6.
        (Quantize(8, 32, stochastic=False), 0.004, 0.006),
        (Quantize(), 0.0055, 0.008),
        (Quantize(8, 256), 0.007, 0.012),  # 0.6-1.2 % is usual
        (Quantize(4), 0.10, 0.15),
        (Fp16(), 1e-4, 3e-4),
        # Of normal numbers: 1 - 2/pi of the energy is lost.
        (Sign(), math.sqrt(1 - 2 / math.pi) - 0.01, math.sqrt(1 - 2 / math.pi) + 0.01),
    ],
)
def test_errors_of_normal_numbers(stage, low, high):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    error = stage.apply(Dense(x), None, context(flat(100_000))).measurements["compression_error"]
    assert low < error < high


def test_half_precision_is_numpys_and_saturates():
    x = torch.tensor([1.0, 1 / 3, 70000.0, -3e38, 6e-8, 1e-9, -0.0, 65519.0])
    out = Fp16().apply(Dense(x), None, context(flat(8))).update.vector
    assert out[:2].tolist() == np.array([1.0, 1 / 3], dtype=np.float16).astype(np.float32).tolist()
    assert out[2:4].tolist() == [65504.0, -65504.0]
    assert out[4:6].tolist() == [2.0**-24, 0.0]
    assert math.copysign(1.0, float(out[6])) == -1.0
    assert float(out[7]) == 65504.0


def test_sign_keeps_the_mean_magnitude_of_each_tensor():
    out = Sign().apply(Dense(torch.tensor([1.0, -3.0, 0.0, 0.0, 8.0])), None, context(flat(2, 2, 0, 1))).update
    assert out.vector.tolist() == [2.0, -2.0, 0.0, 0.0, 8.0]
    assert out.grid.bits == 1
    assert out.grid.codes.tolist() == [1, -1, 1, 1, 1]


@given(updates_with_layouts())
def test_sign_never_enlarges(case):
    layout, update = case
    out = Sign().apply(update, None, context(layout)).update
    for was, now in zip(pieces(update, layout), pieces(out, layout), strict=True):
        assert float64_norm(now) <= float64_norm(was) * (1 + 1e-6) + 1e-44


def test_entropy_sends_what_does_not_round_to_zero():
    x = torch.tensor([0.0, 1.0, -1.0, 10.0, 0.4, -6.0])
    stage, rms = Entropy(1.0), math.sqrt((2 + 100 + 0.16 + 36) / 6)  # 4.8
    step = stage.apply(Dense(x), None, context(flat(6)))
    assert step.update.indices.tolist() == [3, 5]
    assert step.update.grid.codes.tolist() == [2, -1]
    assert step.update.values.tolist() == pytest.approx([2 * rms, -rms])
    assert step.update.grid.bits == 4
    assert step.measurements["density"] == pytest.approx(1 / 3)


def test_most_normal_numbers_round_to_zero():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    # P(|x| < 1) = 0.683, P(|x| < 2) = 0.954.
    for step, density in ((2.0, 0.317), (4.0, 0.0455)):
        out = Entropy(step).apply(Dense(x), None, context(flat(50_000, 50_000)))
        assert out.measurements["density"] == pytest.approx(density, rel=0.03)
    assert out.update.grid.bits == 1, "all that is left are +1 and -1"


def test_a_tensor_with_an_outlier_has_a_step_of_its_own():
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([1e4, 1.0])])
    out = Entropy(0.01).apply(Dense(x), None, context(flat(10_000, 2))).update
    assert len(set(out.grid.scales.tolist())) == 2
    assert float(to_dense(out, flat(10_002))[10_000]) == pytest.approx(1e4, rel=1e-6)
    assert norm(Dense(to_dense(out, flat(10_002))[:10_000] - x[:10_000])) / norm(Dense(x[:10_000])) < 0.4


@pytest.mark.parametrize("stage", [Quantize(), Quantize(2, 1, False), Sign(), Entropy(), Fp16()])
@pytest.mark.parametrize("sizes", [(0,), (0, 0), (1,), (3, 0, 1)])
def test_nothing_and_zeros_come_through(stage, sizes):
    layout = flat(*sizes)
    none = torch.zeros(0, dtype=torch.int64)
    for update in (Dense(torch.zeros(layout.size)), Sparse(none, torch.zeros(0)), Sparse(none[:0], torch.zeros(0))):
        step = stage.apply(update, None, context(layout))
        check_grid(step.update, layout)
        assert not to_dense(step.update, layout).any()
        assert step.measurements["compression_error"] == 0.0


@pytest.mark.parametrize("value", [3.4028234e38, -3.4028234e38, 1e38, 1.17e-38, 1.4e-45, 2e-43])
@pytest.mark.parametrize("stage", [Quantize(), Quantize(2), Quantize(5, 2, False), Sign(), Entropy(0.6), Entropy(0.9), Entropy(1e-3)])
def test_the_ends_of_float32(stage, value):
    x = torch.tensor([value, value / 2, 0.0, -value])
    out = stage.apply(Dense(x), None, context(flat(4))).update
    check_grid(out, flat(4))
    assert torch.isfinite(values_of(out)).all()
    assert abs(float(to_dense(out, flat(4))[0]) - value) <= abs(value) * 0.7 + 1.5e-45


@given(updates_with_layouts(), STAGES, st.sampled_from([1e-12, 0.1, 10.0]))
def test_the_guard_keeps_every_bound_after_a_clip_and_a_rounding(case, stage, limit):
    layout, update = case
    for clip in (ClipByGlobalNorm(limit), ClipPerLayer(limit), ClipPerLayer(limit, "uniform", "normalize")):
        stages = chain(clip, stage)
        assert stages.unbounded_stage() is None
        sent = stages.apply(update, (None, None), context(layout)).update
        guarded, bound = stages.guard.apply(sent, None, context(layout)).update, stages.bound(UNBOUNDED, layout)
        assert float64_norm(values_of(guarded)) <= bound.total
        for h, most in enumerate(bound.per_layer or ()):
            assert float64_norm(layout.split(to_dense(guarded, layout))[h]) <= most
        # What the guard takes off is at most what rounding put on.
        clipped = clip.apply(update, None, context(layout)).update
        rounding = norm(subtract(clipped, sent, layout))
        # A norm over the bound by less than the slack of the factor is still scaled to it.
        assert norm(subtract(sent, guarded, layout)) <= rounding * (1 + 1e-5) + 2e-5 * bound.total


def test_a_clip_may_come_after_and_takes_the_update_off_its_grid():
    stages = chain(TopK(0.5), Quantize(), ClipByGlobalNorm(0.1))
    out = stages.apply(Dense(torch.arange(8.0)), (None,) * 3, context(flat(8))).update
    assert out.grid is None
    assert norm(out) <= 0.1


@pytest.mark.parametrize("stage", [Quantize(3, stochastic=False), Sign(), Entropy(), chain(TopK(0.3), Quantize(4)), Fp16()])
def test_error_feedback_keeps_what_rounding_lost(stage):
    layout = flat(30, 1)
    loop = with_error_feedback(stage)
    state, sent, total = loop.init(layout), torch.zeros(31, dtype=torch.float64), torch.zeros(31, dtype=torch.float64)
    for r in range(1, 30):
        update = torch.randn(31, generator=torch.Generator().manual_seed(r))
        step = loop.apply(Dense(update), state, context(layout, r))
        state = step.state
        sent, total = sent + to_dense(step.update, layout).double(), total + update.double()
    assert torch.allclose(sent + state[0].double(), total, atol=1e-4)
    assert norm(Dense(state[0])) < 30, "the residual stays about as large as an update, and does not pile up"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantize(1), "2 <= bits <= 8, got 1; for one bit take sign"),
        (lambda: Quantize(9), "bits <= 8"),
        (lambda: Quantize(8, 0), "block >= 1"),
        (lambda: Entropy(0.0), "step > 0"),
        (lambda: Entropy(math.inf), "step > 0"),
    ],
)
def test_impossible_arguments_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()

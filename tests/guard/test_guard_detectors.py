"""Running statistics and detectors on series of which it is known whether they should alarm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qk.guard.detector import CollapseDetector, Sensitivity
from lightning_qk.guard.reading import Place, Reading, Window, sure

LAYERS, HEADS = ("h.0", "h.1"), 2
PLACES = {
    "attn": [Place(layer, head) for layer in LAYERS for head in range(HEADS)],
    "qk": [Place(layer, head) for layer in LAYERS for head in range(HEADS)],
    "hidden": [Place(layer) for layer in LAYERS],
}


def series(
    count=60, *, seed=0, noise=0.05, scale=1.0, logit=None, entropy=None, cosine=None, norm=None, loss=None
):
    """Readings; each argument gives a quantity at a reading, the second layer's where there are several."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(value, size=4):
        return value * (noise * torch.randn(size, generator=generator)).exp()

    for index in range(count):
        values = {
            "attn/max_abs_logit": noisy(8.0),
            "attn/entropy_normalized": noisy(0.6).clamp_max(1),
            "attn/logit_std": noisy(2.0),
            "qk/frobenius_sq": noisy(1.0),
            "qk/sym_var": noisy(0.1),
            "hidden/cosine": noisy(0.5, len(LAYERS)),
        }
        if logit is not None:
            values["attn/max_abs_logit"][3] = noisy(logit(index), 1)[0]
        if entropy is not None:
            values["attn/entropy_normalized"][2:] = noisy(entropy(index), HEADS).clamp_max(1)
        if cosine is not None:
            values["hidden/cosine"][1] = cosine(index)
        if norm is not None:
            values["qk/frobenius_sq"][2:] = noisy(norm(index), HEADS)
        level = 3.0 * math.exp(-0.02 * index) if loss is None else loss(index)
        losses = (scale * level * (1 + 0.02 * torch.randn(4, generator=generator))).tolist()
        yield Reading(4 * (index + 1), losses, values, PLACES)


def alarms(readings, **sensitivity):
    detector = CollapseDetector(Sensitivity(**sensitivity))
    return [verdict for verdict in map(detector.observe, readings) if verdict.fired]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    noise=st.floats(0.0, 0.15),
    drift=st.floats(-0.01, 0.01),
    scale=st.floats(1e-3, 1e3),
    falls=st.booleans(),
)
def test_constants_and_slow_drifts_with_noise_are_no_alarm(seed, noise, drift, scale, falls):
    found = alarms(
        series(
            40,
            seed=seed,
            noise=noise,
            scale=scale,
            logit=lambda i: 8 * math.exp(drift * i),
            entropy=lambda i: 0.5 * math.exp(drift * i),
            norm=lambda i: math.exp(drift * i),
            loss=None if falls else lambda i: 2.0,
        )
    )
    assert not found


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.1, 0.5))
def test_exponential_growth_of_logits_is_told_before_they_are_there(seed, rate):
    readings = list(series(seed=seed, logit=lambda i: 5 * math.exp(rate * i)))
    (alarm,) = alarms(readings)
    values = {reading.step: float(reading.values["attn/max_abs_logit"][3]) for reading in readings}
    assert values[alarm.step] < 300
    assert "head 1 of h.1" in alarm.reason
    assert f"{values[alarm.step]:.4g}" in alarm.reason


def test_small_logits_that_grow_fast_are_no_alarm():
    # As in the first steps of every run: from next to nothing to a tenth of the limit, and there it stays.
    assert not alarms(series(logit=lambda i: min(11.0, 0.05 * math.exp(0.5 * i))))
    (alarm,) = alarms(series(20, logit=lambda i: 0.05 * math.exp(0.5 * i)))
    assert alarm.scores["logits"] >= 1


def test_entropy_that_drops_names_the_layer():
    (alarm,) = alarms(series(entropy=lambda i: 0.6 * math.exp(-0.12 * i)))
    assert alarm.scores["entropy"] >= 1
    assert "entropy of h.1" in alarm.reason


def test_alike_tokens_are_an_alarm_only_while_the_loss_stands_still():
    still = alarms(series(cosine=lambda i: 0.99, loss=lambda i: 3.0))
    assert "before h.1" in still[0].reason
    assert not alarms(series(cosine=lambda i: 0.99))


@pytest.mark.parametrize(("steps", "alarming"), [(5, False), (24, True)])
def test_a_pause_of_the_loss_is_no_alarm_and_a_long_one_is(steps, alarming):
    begin = 20

    def loss(index):
        return 3.0 * math.exp(-0.03 * (min(index, begin) + max(0, index - begin - steps)))

    assert bool(alarms(series(60, noise=0, cosine=lambda i: 0.985, loss=loss))) == alarming


def test_uniform_attention_of_identical_tokens_is_an_alarm_though_the_loss_falls():
    (alarm,) = alarms(series(20, cosine=lambda i: 0.5 if i < 6 else 0.99999, entropy=lambda i: 1.0))
    assert alarm.scores["rank"] >= 1
    assert "mean cosine of 0.99999, after 0.5 at first" in alarm.reason


def test_tokens_that_were_identical_from_the_start_are_no_alarm_while_the_loss_falls():
    # A decoder's queries at its first layers.
    assert not alarms(series(20, cosine=lambda i: 0.99999))
    (alarm, *_) = alarms(series(30, cosine=lambda i: 0.99999, loss=lambda i: 3.0))
    assert "while the loss stands still" in alarm.reason


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    "given",
    [
        {"entropy": lambda i: 0.01 * math.exp(0.1 * i)},
        {"entropy": lambda i: 0.03},
        {"logit": lambda i: 900 * math.exp(-0.05 * i)},
        {"logit": lambda i: 150.0},
    ],
)
def test_what_goes_the_other_way_or_stays_is_no_collapse(given, noise):
    assert not alarms(series(60, noise=noise, **given))


def test_what_stays_bad_is_an_alarm_while_the_loss_stands_still():
    (alarm, *_) = alarms(series(40, entropy=lambda i: 0.03, loss=lambda i: 3.0))
    assert "stays at" in alarm.reason
    assert "least in head" in alarm.reason


@pytest.mark.parametrize("name", ["entropy", "logit", "cosine"])
def test_nothing_is_said_after_one_reading(name):
    worst = {"entropy": 0.001, "logit": 5000.0, "cosine": 1.0}[name]
    found = alarms(series(30, noise=0, **{name: lambda i: worst if i >= 2 else 0.4}))
    assert all(alarm.step > 4 * 3 for alarm in found)
    assert found


def test_what_did_not_run_has_no_reading():
    def silent(reading):
        values = {name: value.clone() for name, value in reading.values.items()}
        for value in values.values():
            value[len(value) // 2 :] = math.nan
        return Reading(reading.step, reading.losses, values, PLACES)

    readings = list(
        series(40, logit=lambda i: 5 * math.exp(0.2 * i), entropy=lambda i: 0.6 * math.exp(-0.2 * i))
    )
    assert not alarms(map(silent, readings))
    # A layer that is skipped at every second step is judged by the others.
    (alarm, *_) = alarms(silent(one) if i % 2 else one for i, one in enumerate(readings))
    assert "nan" not in alarm.reason


def test_norms_that_grow_while_the_loss_stands_still():
    assert alarms(series(norm=lambda i: 0.01 * math.exp(0.6 * min(i, 40)), loss=lambda i: 3.0))
    assert not alarms(
        series(norm=lambda i: 0.01 * math.exp(0.6 * min(i, 40)), loss=lambda i: 30 * math.exp(-0.1 * i))
    )


def test_a_loss_that_rises_or_is_no_number():
    (rising,) = alarms(series(loss=lambda i: 2.0 if i < 30 else 3.0))
    assert "risen" in rising.reason
    (broken,) = alarms(series(loss=lambda i: 2.0 if i < 30 else math.nan))
    assert broken.step == 4 * 31
    assert "nan" in broken.reason


@pytest.mark.parametrize("spike", [0, 5, 20])
def test_one_reading_that_is_far_out_is_no_alarm(spike):
    assert not alarms(series(logit=lambda i: 5000.0 if i == spike else 8.0))


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(1e-4, 1e4), seed=st.integers(0, 100))
def test_the_scale_of_the_loss_does_not_matter(scale, seed):
    def run(size):
        readings = series(
            50, seed=seed, scale=size, cosine=lambda i: 0.99, loss=lambda i: 3.0 if i > 20 else 4 - i / 20
        )
        return [alarm.step for alarm in alarms(readings)]

    assert run(scale) == run(1.0)


def test_an_alarm_is_given_once_and_again_after_the_numbers_were_healthy():
    bad = range(20, 30), range(60, 70)
    found = alarms(series(90, logit=lambda i: 500.0 if any(i in part for part in bad) else 8.0))
    assert len(found) == 2


def test_infinite_logits_do_not_wait():
    (alarm,) = alarms(series(20, logit=lambda i: math.inf if i == 9 else 8.0))
    assert alarm.step == 40


def test_a_state_goes_on_where_it_was():
    readings = list(series(logit=lambda i: 5 * math.exp(0.2 * i)))
    whole = CollapseDetector()
    want = [whole.observe(reading) for reading in readings]
    first, second = CollapseDetector(), CollapseDetector()
    got = [first.observe(reading) for reading in readings[:13]]
    second.load_state_dict(first.state_dict())
    assert got + [second.observe(reading) for reading in readings[13:]] == want


def test_a_trend_is_that_of_most_rows():
    window = Window(9)
    for index in range(9):
        window.append(torch.tensor([3.0 * index, 1.0]) if index != 4 else torch.tensor([1e6, -1e6]))
    slope, error = window.trend()
    assert slope.tolist() == pytest.approx([3.0, 0.0])
    assert error.tolist() == pytest.approx([0.0, 0.0])
    assert sure(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0])).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 3},
        {"logit": 0.0},
        {"entropy": 1.0},
        {"patience": 0},
        {"growth": 1.0},
        {"lasting": 0},
        {"onset": 1.0},
    ],
)
def test_refuses_what_means_nothing(arguments):
    with pytest.raises(ValueError, match="expected"):
        Sensitivity(**arguments)


def with_updates(readings, norm):
    """The same readings with norms of the second layer's updates."""
    for reading in readings:
        index = reading.step // 4 - 1
        update = torch.ones(4)
        update[2:] = norm(index)
        yield Reading(
            reading.step, reading.losses, {**reading.values, "qk/update_delta2_norm": update}, PLACES
        )


def test_updates_are_looked_at_only_where_asked_for():
    def jump(index):
        return 1.0 if index < 20 else 12.0

    assert not alarms(with_updates(series(), jump))
    silent = CollapseDetector()
    verdicts = [silent.observe(reading) for reading in with_updates(series(12), jump)]
    assert "updates" not in verdicts[-1].scores
    (alarm,) = alarms(with_updates(series(), jump), update=6.0)
    assert alarm.scores["updates"] >= 1
    assert "the update of W_QK in h.1 between two readings has grown 12-fold to a norm of 12" in alarm.reason
    assert 4 * 21 < alarm.step <= 4 * 24
    assert not alarms(with_updates(series(), jump), update=15.0)
    # One that is far out, growth by less than that a window, and none at the first reading.
    assert not alarms(with_updates(series(), lambda i: 50.0 if i == 30 else 1.0), update=6.0)
    assert not alarms(with_updates(series(), lambda i: 1.1**i), update=6.0)
    late = with_updates(series(), lambda i: math.nan if i == 0 else jump(i))
    assert len(alarms(late, update=6.0)) == 1


def test_update_is_off_or_above_one():
    assert not Sensitivity().watches_updates
    with pytest.raises(ValueError, match="update above 1"):
        Sensitivity(update=0.5)

"""What the alert rules are tried on: runs that are well and runs that are sick, as unit tests for promtool.

A scenario is a healthy run of four ranks, three hours old, with some of its series replaced. What is expected is every
alert that fires at a moment, so that each scenario tests all rules: those that should not fire, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

INTERVAL_SECONDS = 60
PER_MINUTE = 60 // INTERVAL_SECONDS
RANKS = 4
LABELS = 'run="demo", run_id="0123abcd"'
DRIVER = f'{LABELS}, role="driver", instance="node0:9390"'

SHARES = {"data_wait": 0.02, "forward": 0.3, "loss": 0.05, "backward": 0.5}
"""Of a healthy rank's time, by phase, as far as rules could see them."""
COLLECTIVES = 0.1


def rank_labels(rank: int) -> str:
    return f'{LABELS}, role="rank", rank="{rank}", instance="node{rank // 2}:940{rank % 2}"'


@dataclass(frozen=True)
class Piece:
    """Some minutes of a series: from `start` on (None: where the piece before has ended), `rate` more per second.
    Absent where `start` is NaN."""

    minutes: float
    rate: float = 0.0
    start: float | None = None
    absent: bool = False
    text: str = ""
    """In place of a number: `NaN` or `Inf`."""


Pieces = list[Piece]


def values(pieces: Pieces) -> str:
    """In promtool's notation, a value per INTERVAL_SECONDS."""
    parts, now = [], 0.0
    for piece in pieces:
        count = round(piece.minutes * PER_MINUTE)
        if piece.absent:
            # Prometheus marks the end of a series; without that it would count for five minutes more.
            parts.append(f"stale _x{count - 1}" if parts else f"_x{count}")
            continue
        if piece.text:
            parts.append(" ".join([piece.text] * count))
            continue
        now = now if piece.start is None else piece.start
        step = piece.rate * INTERVAL_SECONDS
        # `a+bxn` has n + 1 values.
        parts.append(f"{now:g}{step:+g}x{count - 1}")
        now += step * count
    return " ".join(parts)


def well(minutes: float = 180) -> dict[str, Pieces]:
    """A run that trains with 10 steps and 640 samples per minute and rank, and saves every 20 minutes."""
    steady = [Piece(minutes, start=1.0)]
    series: dict[str, Pieces] = {
        f"up{{{DRIVER}}}": steady,
        f"process_start_time_seconds{{{DRIVER}}}": [Piece(minutes, start=0.0)],
        f"symile_run_expected_ranks{{{DRIVER}}}": [Piece(minutes, start=float(RANKS))],
        f'symile_run_restarts_total{{cause="rank_lost", {DRIVER}}}': [Piece(minutes, start=0.0)],
        f'symile_run_restarts_total{{cause="preemption", {DRIVER}}}': [Piece(minutes, start=0.0)],
    }
    for rank in range(RANKS):
        series |= rank_series(rank, minutes)
    return series


def rank_series(rank: int, minutes: float) -> dict[str, Pieces]:
    """A rank's series while it trains."""
    labels, steps_per_second = rank_labels(rank), 1 / 6
    saves = [Piece(20, start=1200.0 * number) for number in range(int(minutes // 20) + 1)]
    series = {
        f"up{{{labels}}}": [Piece(minutes, start=1.0)],
        f"symile_train_steps_total{{{labels}}}": [Piece(minutes, steps_per_second, 0.0)],
        f"symile_train_samples_total{{{labels}}}": [Piece(minutes, 64 * steps_per_second, 0.0)],
        f"symile_train_loss{{{labels}}}": [Piece(minutes, -0.0001, 5.0)],
        f'symile_train_skipped_steps_total{{reason="nonfinite_grad", {labels}}}': [Piece(minutes, start=0.0)],
        f'symile_train_skipped_steps_total{{reason="overflow", {labels}}}': [Piece(minutes, start=0.0)],
        f'symile_collective_seconds_total{{op="all_gather", {labels}}}': [Piece(minutes, COLLECTIVES, 0.0)],
        f"symile_checkpoint_last_success_timestamp_seconds{{{labels}}}": saves,
        f"symile_checkpoint_failures_total{{{labels}}}": [Piece(minutes, start=0.0)],
    }
    for phase, share in SHARES.items():
        series[f'symile_train_phase_seconds_total{{phase="{phase}", {labels}}}'] = [Piece(minutes, share, 0.0)]
    for modality in ("audio", "image") if rank < 3 else ():  # whether all ranks tell it is not the rules' matter
        series[f'symile_contrastive_effective_rank{{modality="{modality}", {labels}}}'] = [Piece(minutes, start=40.0)]
        series[f'symile_contrastive_uniformity{{modality="{modality}", {labels}}}'] = [Piece(minutes, start=-2.5)]
    return series


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One unit test."""

    name: str
    series: dict[str, Pieces]
    firing: dict[float, tuple[str, ...]] = field(default_factory=dict)
    """Minute -> the alerts that fire then; none of the others does."""


def _changed(series: Mapping[str, Pieces], changes: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """With other pieces for every series whose name and labels hold all words of a key."""
    made = dict(series)
    for key, pieces in changes.items():
        found = [name for name in made if all(word in name for word in key.split())]
        assert found, f"no series of a healthy run is {key}"
        made |= dict.fromkeys(found, pieces)
    return made


def _cut(series: Mapping[str, Pieces], minutes: float, which: str = "") -> dict[str, Pieces]:
    """Series that end: their endpoints were taken off the list."""
    return {
        name: [*_first(pieces, minutes), Piece(300 - minutes, absent=True)] if which in name else pieces
        for name, pieces in series.items()
    }


def _first(pieces: Pieces, minutes: float) -> Pieces:
    kept, left = [], minutes
    for piece in pieces:
        if left > 0:
            taken = min(left, piece.minutes)
            kept.append(Piece(taken, piece.rate, piece.start, piece.absent, piece.text))
            left -= taken
    return kept


def _killed_ranks(minute: float, for_minutes: float, total: float = 180) -> dict[str, Pieces]:
    """All ranks end at a minute; others take their places some minutes later, at other ports."""
    driver = {name: pieces for name, pieces in well(total).items() if 'role="driver"' in name}
    driver[f'symile_run_restarts_total{{cause="rank_lost", {DRIVER}}}'] = [
        Piece(minute, start=0.0),
        Piece(total - minute, start=1.0),
    ]
    before: dict[str, Pieces] = {}
    for rank in range(RANKS):
        before |= rank_series(rank, minute)
    after = {
        name.replace(":94", ":95"): [Piece(minute + for_minutes, absent=True), *pieces]
        for rank in range(RANKS)
        for name, pieces in rank_series(rank, total - minute - for_minutes).items()
    }
    for name in [name for name in after if "last_success" in name]:
        after[name] = [
            Piece(minute + for_minutes, absent=True),
            Piece(total, start=60 * (minute - 5)),
        ]
    return driver | {name: [*pieces, Piece(300, absent=True)] for name, pieces in before.items()} | after


def scenarios() -> list[Scenario]:
    """All of them: for each alert at least one run on which it fires, and runs on which none does."""
    made = [
        Scenario(name="a healthy run", series=well(), firing=dict.fromkeys((0, 1, 5, 10, 16, 30, 60, 100, 179), ())),
        Scenario(
            name="a run that ends after two hours",
            series=_cut(well(), 120),
            firing=dict.fromkeys((119, 120, 121, 123, 126, 130, 136, 150, 179), ()),
        ),
        Scenario(
            name="a restart that takes two minutes",
            series=_killed_ranks(90, 2),
            firing=dict.fromkeys((89, 91, 92, 94, 97, 101, 105, 110, 150), ()),
        ),
        Scenario(
            name="a start that takes four minutes",
            series={
                name: pieces if 'role="driver"' in name else [Piece(4, absent=True), *pieces]
                for name, pieces in well(60).items()
            },
            firing=dict.fromkeys((1, 3, 5, 8, 11, 20, 59), ()),
        ),
        Scenario(
            name="a group that waits for a node for an hour",
            series=_killed_ranks(60, 60),
            firing={64: (), 67: ("RanksMissing",), 70: ("RanksMissing",), 80: ("RanksMissing", "TrainingStalled")},
        ),
        Scenario(
            name="one rank does not answer",
            series=_changed(well(), {'up{ rank="3"': [Piece(60, start=1.0), Piece(120, start=0.0)]}),
            firing={60: (), 64: (), 66: ("RanksMissing",), 120: ("RanksMissing",)},
        ),
        Scenario(
            name="one rank does not answer for three minutes",
            series=_changed(
                well(), {'up{ rank="3"': [Piece(60, start=1.0), Piece(3, start=0.0), Piece(117, start=1.0)]}
            ),
            firing=dict.fromkeys((62, 64, 66, 70), ()),
        ),
        Scenario(
            name="the driver and all ranks are killed",
            series={
                name: [
                    *_first(pieces, 60),
                    Piece(120, start=0.0) if name.startswith("up{") else Piece(120, absent=True),
                ]
                for name, pieces in well().items()
            },
            firing={60: (), 64: (), 66: ("RanksMissing",), 120: ("RanksMissing",)},
        ),
        Scenario(
            name="ranks that hang",
            series=_changed(
                well(),
                {
                    "_seconds_total{": [Piece(60, 0.1, 0.0), Piece(120)],
                    "symile_train_steps_total": [Piece(60, 1 / 6, 0.0), Piece(120)],
                    "symile_train_samples_total": [Piece(60, 64 / 6, 0.0), Piece(120)],
                },
            ),
            firing={60: (), 70: (), 77: ("ThroughputDrop", "TrainingStalled")},
        ),
        Scenario(
            name="a run that never takes a step",
            series=_changed(
                well(60),
                {
                    "_seconds_total{": [Piece(60, start=0.0)],
                    "symile_train_steps_total": [Piece(60, start=0.0)],
                    "symile_train_samples_total": [Piece(60, start=0.0)],
                },
            ),
            firing={9: (), 11: ("TrainingStalled",), 59: ("TrainingStalled",)},
        ),
    ]
    for text in ("NaN", "Inf", "-Inf"):
        loss = [Piece(60, -0.0001, 5.0), Piece(10, text=text), Piece(110, start=4.0)]
        made.append(
            Scenario(
                name=f"a loss of {text} on one rank",
                series=_changed(well(), {'symile_train_loss rank="1"': loss}),
                firing={59: (), 61: ("LossNotFinite",), 69: ("LossNotFinite",), 71: ()},
            )
        )
    skipped = {"symile_train_skipped_steps_total nonfinite_grad": [Piece(60, start=0.0), Piece(10, 0.05)]}
    single = {"symile_train_skipped_steps_total nonfinite_grad": [Piece(60, start=0.0), Piece(120, start=3.0)]}
    overflow = {"symile_train_skipped_steps_total overflow": [Piece(2, 0.15, 0.0), Piece(178)]}
    made += [
        Scenario(
            name="a third of the steps is skipped for ten minutes",
            series=_changed(well(), {key: [*pieces, Piece(110)] for key, pieces in skipped.items()}),
            firing={60: (), 66: ("GradSkipStorm",), 70: ("GradSkipStorm",), 81: ()},
        ),
        Scenario(
            name="three steps are skipped", series=_changed(well(), single), firing=dict.fromkeys((61, 65, 70), ())
        ),
        Scenario(
            name="fp16 looks for its loss scale",
            series=_changed(well(), overflow),
            firing=dict.fromkeys((1, 2, 3, 5, 10), ()),
        ),
        Scenario(
            name="fp16 overflows for good",
            series=_changed(
                well(), {"symile_train_skipped_steps_total overflow": [Piece(60, start=0.0), Piece(120, 1 / 6)]}
            ),
            firing={60: (), 70: ("GradSkipStorm",), 120: ("GradSkipStorm",)},
        ),
        Scenario(
            name="one rank waits for data, and the others for it",
            series=_changed(
                well(),
                {
                    'phase="data_wait" rank="2"': [Piece(60, 0.02, 0.0), Piece(60, 0.3), Piece(60, 0.02)],
                    'phase="forward" rank="2"': [Piece(60, 0.3, 0.0), Piece(60, 0.2), Piece(60, 0.3)],
                },
            ),
            firing={60: (), 65: (), 76: ("DataStarved",), 82: ("DataStarved", "Straggler"), 130: ()},
        ),
        Scenario(
            name="a minute of waiting for data",
            series=_changed(well(), {'phase="data_wait"': [Piece(60, 0.02, 0.0), Piece(1, 0.9), Piece(119, 0.02)]}),
            firing=dict.fromkeys((61, 63, 66, 72, 80), ()),
        ),
        Scenario(
            name="half the throughput",
            series=_changed(
                well(),
                {
                    "symile_train_samples_total": [Piece(90, 64 / 6, 0.0), Piece(90, 32 / 6)],
                    "symile_train_steps_total": [Piece(90, 1 / 6, 0.0), Piece(90, 1 / 12)],
                },
            ),
            # After half an hour that is the usual throughput.
            firing={90: (), 95: (), 105: ("ThroughputDrop",), 115: ("ThroughputDrop",), 130: ()},
        ),
        Scenario(
            name="half the throughput in the first half hour of a run",
            series=_changed(
                well(60),
                {
                    "symile_train_samples_total": [Piece(20, 64 / 6, 0.0), Piece(40, 32 / 6)],
                    "symile_train_steps_total": [Piece(20, 1 / 6, 0.0), Piece(40, 1 / 12)],
                },
            ),
            firing=dict.fromkeys((20, 30, 40, 50), ()),
        ),
        Scenario(
            name="one rank computes for longer, and the others wait for it",
            series=_changed(
                well(),
                {
                    'phase="forward" rank="3"': [Piece(60, 0.3, 0.0), Piece(60, 0.55), Piece(60, 0.3)],
                    'phase="backward" rank="3"': [Piece(60, 0.45, 0.0), Piece(60, 0.2), Piece(60, 0.45)],
                    'symile_collective_seconds_total rank="3"': [Piece(180, 0.08, 0.0)],
                },
            ),
            firing={60: (), 70: (), 82: ("Straggler",), 119: ("Straggler",), 130: ()},
        ),
        Scenario(
            name="one rank waits in no collective, where the others wait",
            series=_changed(
                well(),
                {
                    "symile_collective_seconds_total": [Piece(60, 0.1, 0.0), Piece(120, 0.4)],
                    'symile_collective_seconds_total rank="1"': [Piece(60, 0.1, 0.0), Piece(120, 0.05)],
                },
            ),
            firing={60: (), 70: (), 82: ("Straggler",), 179: ("Straggler",)},
        ),
        Scenario(
            name="a rank that is a tenth slower",
            series=_changed(well(), {'phase="forward" rank="3"': [Piece(180, 0.33, 0.0)]}),
            firing=dict.fromkeys((30, 60, 179), ()),
        ),
        Scenario(
            name="no checkpoint after the first hour",
            series=_changed(well(240), {"last_success": [Piece(60, start=0.0), Piece(180, start=3600.0)]}),
            firing={60: (), 120: (), 179: (), 182: ("CheckpointStale",), 239: ("CheckpointStale",)},
        ),
        Scenario(
            name="no checkpoint ever",
            series={name: pieces for name, pieces in well().items() if "last_success" not in name},
            firing={60: (), 119: (), 122: ("CheckpointStale",), 179: ("CheckpointStale",)},
        ),
        Scenario(
            name="a run goes on from a checkpoint of three days ago",
            series=_changed(well(100), {"last_success": [Piece(100, start=-250000.0)]}),
            firing=dict.fromkeys((0, 1, 5, 30, 90), ()),
        ),
        Scenario(
            name="two saves fail",
            series=_changed(
                well(),
                {
                    "symile_checkpoint_failures_total": [
                        Piece(60, start=0.0),
                        Piece(10, start=1.0),
                        Piece(110, start=2.0),
                    ]
                },
            ),
            firing={60: (), 69: (), 72: ("CheckpointStale",), 95: ()},
        ),
        Scenario(
            name="three restarts within the hour",
            series=_changed(
                well(),
                {
                    "symile_run_restarts_total rank_lost": [
                        Piece(60, start=0.0),
                        Piece(10, start=1.0),
                        Piece(10, start=2.0),
                        Piece(100, start=3.0),
                    ]
                },
            ),
            firing={60: (), 71: (), 79: (), 81: ("RestartLoop",), 110: ("RestartLoop",), 145: ()},
        ),
        Scenario(
            name="three preemptions within the hour",
            series=_changed(
                well(),
                {
                    "symile_run_restarts_total preemption": [
                        Piece(60, start=0.0),
                        Piece(10, start=1.0),
                        Piece(110, start=3.0),
                    ]
                },
            ),
            firing=dict.fromkeys((61, 71, 100), ()),
        ),
        Scenario(
            name="the audio of one rank collapses",
            series=_changed(
                well(),
                {'effective_rank audio rank="2"': [Piece(60, start=40.0), Piece(60, start=1.1), Piece(60, start=30.0)]},
            ),
            firing={60: (), 89: (), 91: ("ContrastiveCollapse",), 119: ("ContrastiveCollapse",), 121: ()},
        ),
        Scenario(
            name="embeddings that are alike when training begins",
            series=_changed(
                well(),
                {
                    "effective_rank": [Piece(20, start=1.1), Piece(160, start=30.0)],
                    "uniformity": [Piece(20, start=-0.01), Piece(160, start=-2.0)],
                },
            ),
            firing=dict.fromkeys((5, 19, 29, 31, 60), ()),
        ),
        Scenario(
            name="everything becomes one point",
            series=_changed(well(), {"uniformity image": [Piece(60, start=-2.5), Piece(120, start=-0.01)]}),
            firing={60: (), 89: (), 91: ("ContrastiveCollapse",)},
        ),
    ]
    return made


def unit_tests(rule_file: str, severities: Mapping[str, str], tried: Sequence[Scenario]) -> dict[str, Any]:
    """What `promtool test rules` reads.

    Args:
        severities: of each alert.
    """
    tests = []
    for scenario in tried:
        expected = [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{minute:g}m",
                "exp_samples": [{"labels": _labels_of(name, severities[name]), "value": 1} for name in sorted(names)],
            }
            for minute, names in scenario.firing.items()
        ]
        tests.append(
            {
                "name": scenario.name,
                "interval": f"{INTERVAL_SECONDS}s",
                "input_series": [
                    {"series": series, "values": values(pieces)} for series, pieces in scenario.series.items()
                ],
                "promql_expr_test": expected,
            }
        )
    return {"rule_files": [rule_file], "evaluation_interval": f"{INTERVAL_SECONDS}s", "tests": tests}


def _labels_of(alert: str, severity: str) -> str:
    return f'ALERTS{{alertname="{alert}", alertstate="firing", severity="{severity}", {LABELS}}}'


def unit_tests_text(rule_file: str, severities: Mapping[str, str], tried: Sequence[Scenario]) -> str:
    return yaml.safe_dump(unit_tests(rule_file, severities, tried), sort_keys=False, width=4000, allow_unicode=True)

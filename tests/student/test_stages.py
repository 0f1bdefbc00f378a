"""A run of stages: each begins with what the ones before it have learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from cli import cli
from stores.targets import TargetStore
from student.checkpoints import load_model, read_checkpoint
from student.experiment import RecipeError, read_recipe
from student.stages import build_stages, train_stages

COMMON = {
    "student": {"size": "32x32"},
    "supervision": {"flip": "none", "labels": [{"labels": "pqft", "hierarchical": 0}]},
    "sampling": {"clips_per_video": 2, "holdout": 0.3, "holdout_of": "frames"},
    "optimisation": {"epochs": 1},
}
THREE = {
    **COMMON,
    "stages": [
        {"name": "wide", "student": {"variant": "tinyhd-s-rc2"}},
        {
            "name": "middle",
            "student": {"variant": "tinyhd-s-rc4"},
            "supervision": {"labels": [], "assistant": {"checkpoint": "stage:wide"}},
        },
        {
            "name": "last",
            "student": {"variant": "tinyhd-s-rc4"},
            "start": "stage:middle",
            "supervision": {"assistant": {"checkpoint": "stage:wide", "hierarchical": 0}},
        },
    ],
}


def test_three_stages_teach_each_other(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    state = train_stages(labelled, out, build_stages(THREE))
    assert state.is_complete
    assert load_model(out / "wide" / "best.pt").config.channel_reduction == 2
    rows = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("wide", "middle", "last")
    }
    terms = {name: {key for key in found[0] if "/" in key} for name, found in rows.items()}
    assert terms["wide"] == {"pqft/saliency"}
    assert terms["middle"] == {"assistant/saliency", "assistant/hierarchical"}
    assert terms["last"] == {"pqft/saliency", "assistant/saliency"}
    began = read_checkpoint(out / "last" / "last.pt")["weights"]
    before = read_checkpoint(out / "middle" / "best.pt")["weights"]
    assert any(not torch.equal(began[name], before[name]) for name in before)

    kept = {path: path.read_bytes() for path in out.rglob("*.pt")}
    assert train_stages(labelled, out, build_stages(THREE)).is_complete
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == kept


def test_a_recipe_of_a_stage_can_be_trained_from_alone(labelled: Path, tmp_path: Path) -> None:
    train_stages(labelled, tmp_path / "run", build_stages(THREE)[:1])
    recipe = read_recipe(tmp_path / "run" / "wide" / "recipe.yaml")
    (term,) = recipe.supervision.labels
    assert term.labels == TargetStore.open(labelled).label_set("pqft").name  # in full
    given = replace(recipe.supervision, labels=(replace(term, labels="pqft"),))
    assert replace(recipe, supervision=given) == build_stages(THREE)[0].config


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "must be a list"),
        ([{"student": "tinyhd-s"}], r"stages\[0\] needs a name"),
        ([{"name": "../up"}], r"stages\[0\] needs a name"),
        ([{"name": "a"}, {"name": "a"}], "two stages are called 'a'"),
        ([{"name": "a", "optimisation": {"epoch": 3}}], "stage a: .*did you mean"),
        ([{"name": "a", "start": "stage:b"}, {"name": "b"}], "needs the student of 'b'"),
    ],
)
def test_stages_that_are_not_possible_are_refused(
    stages: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build_stages({**COMMON, "stages": stages})


def test_stages_and_runs_on_the_command_line(labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({**THREE, "stages": THREE["stages"][:2]}))  # type: ignore[index]
    train = ["train", "--store", str(labelled), "--out", str(tmp_path / "run"), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*train, "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert "stages: wide, middle" in result.output
    assert "weights in" in result.output
    table = CliRunner().invoke(cli, ["runs", str(tmp_path / "run")])
    assert table.exit_code == 0, table.output
    assert "from pqft" in table.output
    assert "from assistant (" in table.output
    assert "S rc2 32x32" in table.output
    none = CliRunner().invoke(cli, ["runs", str(labelled)])
    assert none.exit_code == 1
    assert "no training run in" in none.output


def test_held_out_clips_are_shown_in_tensorboard(labelled: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_stages(
        labelled, tmp_path / "run", build_stages({**COMMON, "optimisation": {"epochs": 2}})
    )
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    shown = events.Images("held out")
    assert len(shown) == 2
    assert shown[0].width == 128 * 6  # frame, teacher, student, d1, d2, d3


def test_no_stage_is_judged_by_what_another_has_learnt() -> None:
    stages = [{"name": "a"}, {"name": "b", "sampling": {"holdout": 0.1}}]
    with pytest.raises(RecipeError, match=r"stage b has sampling\.holdout 0\.1, stage a 0\.3"):
        build_stages({**COMMON, "stages": stages})
    seeds = [{"name": "a"}, {"name": "b", "seed": 5}]
    assert len(build_stages({**COMMON, "stages": seeds})) == 2


def test_labels_of_a_stage_need_it_and_somebody_who_makes_them(
    labelled: Path, tmp_path: Path
) -> None:
    through = {"supervision": {"labels": [{"labels": "stage:wide"}]}}
    stages = [{"name": "narrow", "student": {"variant": "tinyhd-s-rc4"}, **through}]
    with pytest.raises(RecipeError, match="needs the student of 'wide'"):
        build_stages({**COMMON, "stages": stages})
    wide = {"name": "wide", "student": {"variant": "tinyhd-s-rc4"}}
    built = build_stages({**COMMON, "stages": [wide, *stages]})
    assert [stage.learns_through_store for stage in built] == [False, True]
    with pytest.raises(RecipeError, match="give train_stages\\(\\) a label function"):
        train_stages(labelled, tmp_path / "run", built)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"supervision": {"labels": [{"labels": "gone"}]}}, "stage late: .*'gone' was asked for"),
        ({"start": "stage:wide"}, "stage late: .*another network: its channel_reduction is 2"),
        ({"start": "nowhere.pt"}, "stage late: .*nowhere"),
        (
            {
                "student": {"variant": "tinyhd-m-rc4"},
                "supervision": {"labels": [], "assistant": {"checkpoint": "stage:wide"}},
            },
            "stage late: the assistant stage:wide maps 1 frames of a clip, the student 16",
        ),
        (
            {"supervision": {"ground_truth": {"data": "nowhere"}}},
            "stage late: .*nowhere",
        ),
    ],
)
def test_mistakes_of_later_stages_are_told_before_the_first(
    labelled: Path, tmp_path: Path, own: dict[str, object], message: str
) -> None:
    late = {"name": "late", "student": {"variant": "tinyhd-s-rc4"}, **own}
    wide = {"name": "wide", "student": {"variant": "tinyhd-s-rc2"}}
    stages = build_stages({**COMMON, "stages": [wide, late]})
    with pytest.raises(RecipeError, match=message):
        train_stages(labelled, tmp_path / "run", stages)
    assert not (tmp_path / "run").exists()


def test_a_student_that_labels_no_hierarchical_maps_is_no_teacher_of_them(
    labelled: Path, tmp_path: Path
) -> None:
    wide = {"name": "wide", "student": {"variant": "tinyhd-m-rc2"}}
    late = {"name": "late", "supervision": {"labels": [{"labels": "stage:wide"}]}}
    stages = build_stages({**COMMON, "stages": [wide, late]})
    with pytest.raises(RecipeError, match="stage:wide labels its saliency maps alone"):
        train_stages(labelled, tmp_path / "run", stages)


def test_a_stage_is_named_where_there_are_none() -> None:
    with pytest.raises(RecipeError, match="names stage:wide, and has no stages"):
        build_stages({**COMMON, "start": "stage:wide"})

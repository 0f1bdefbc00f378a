from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from student.config import VARIANTS, build_config
from student.experiment import (
    RecipeError,
    build_recipe,
    change_label_set,
    lay_over,
    presets,
    put_online,
    read_recipe,
    write_recipe,
)
from student.recipe import (
    AssistantTerm,
    GroundTruthTerm,
    LabelTerm,
    Optimisation,
    Sampling,
    Supervision,
    TrainConfig,
)


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "given", "meant"),
    [
        ("sead: 1", "sead", "seed"),
        ("optimization: {}", "optimization", "optimisation"),
        ("optimisation: {learning_rat: 1}", "optimisation.learning_rat", "learning_rate"),
        ("student: {hight: 64}", "student.hight", "student.height"),
        (
            "supervision: {labels: [{}, {saliancy: 1}]}",
            "supervision.labels[1].saliancy",
            "saliency",
        ),
        ("supervision: {assistant: {checkpiont: a.pt}}", "assistant.checkpiont", "checkpoint"),
        ("supervision: {ground_truth: {dat: x}}", "supervision.ground_truth.dat", "data"),
    ],
)
def test_misspelt_keys_name_the_nearest(tmp_path: Path, text: str, given: str, meant: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe(written(tmp_path / "recipe.yaml", text))
    told = str(error.value)
    assert "there is no key" in told
    assert f"{given}'; did you mean" in told
    assert f"{meant}'?" in told


def test_keys_like_no_other_are_told_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"no key 'xyz'; there are student, start, supervision"):
        build_recipe({"xyz": 1})
    with pytest.raises(RecipeError, match=r"'supervision\.assistant\.checkpoint' is missing"):
        build_recipe({"supervision": {"assistant": {"saliency": 1}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimisation.epochs=ten", r"optimisation\.epochs: 'ten' .* it is int"),
        ("optimisation.epochs=1.5", r"optimisation\.epochs: 1\.5 .* it is int"),
        ("optimisation.epochs=true", r"optimisation\.epochs: True .* it is int"),
        ("optimisation.learning_rate=yes", r"optimisation\.learning_rate: True .* it is float"),
        ("optimisation.precision=float8", r"precision: 'float8' .* one of 'float32', 'bfloat16'"),
        ("optimisation.ema=often", r"optimisation\.ema: 'often' .* float or nothing"),
        ("optimisation=fast", r"optimisation: 'fast' .* it is Optimisation"),
        ("optimisation.compile=1", r"optimisation\.compile: 1 .* it is bool"),
        ("supervision.labels=hd2s", r"supervision\.labels: 'hd2s' .* it is a list"),
        ("supervision.labels={labels: hd2s}", r"supervision\.labels: {.*} .* it is a list"),
        ("supervision.labels=[{saliency: much}]", r"saliency.*'much'"),
        ("supervision.labels=[{saliency: -1}]", r"weight saliency must not be negative, got -1"),
        ("supervision.labels=[{labels: a}, {labels: a}]", r"label set 'a' is named twice"),
        ("supervision.labels=[]", r"nothing to learn from"),
        ("supervision.labels=[{saliency: 0, hierarchical: 0}]", r"nothing to learn from"),
        ("supervision.hierarchical=median", r"one of 'auto', 'identity', 'mean'"),
        ("student=5", r"student: 5"),
        ("student.variant=tinyhd-s-rc5", r"no 'tinyhd-s-rc5'; did you mean 'tinyhd-s-rc[24]'"),
        ("student.variant=[a]", r"student\.variant: there is no \['a'\]"),
        ("student.size=64", r"student\.size: 64 is not HEIGHTxWIDTH"),
        ("student.size=100x100", r"height must be a positive multiple of 32, got 100"),
        ("sampling.holdout=1", r"holdout must be at least 0 and less than 1, got 1"),
        ("sampling.unlabelled=-1", r"unlabelled must not be negative"),
        ("optimisation.ema=1", r"ema must be between 0 and 1"),
        ("optimisation.learning_rate=.nan", r"learning_rate must be positive, got nan"),
        ("optimisation.momentum=1", r"momentum must be at least 0 and less than 1, got 1"),
        ("optimisation.weight_decay=.inf", r"weight_decay must not be negative or infinite"),
        ("seed=-1", r"seed must be from 0"),
        ("seed", r"--set takes KEY=VALUE, got 'seed'"),
        ("seed=[", r"--set seed=\[: the value is no YAML"),
        ("seed=2001-99-99", r"--set seed=2001-99-99: the value is no YAML"),
    ],
)
def test_values_that_make_no_sense_are_named(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(changes=[change])
    assert "\n" not in str(error.value)


def test_terms_about_decoders_that_are_not_there_are_refused() -> None:
    student = ["student.decoders=[d2]", "student.single=[true]"]
    with pytest.raises(RecipeError, match=r"decoder d1, the student has d2; give .* weight 0"):
        read_recipe(changes=student)
    without = [*student, "supervision.labels=[{hierarchical: 0, d2: 1}]"]
    assert read_recipe(changes=without).student.decoders == ("d2",)


def test_hierarchical_maps_that_cannot_be_compared_are_refused_before_anything_runs() -> None:
    changes = ["student.variant=tinyhd-m", "supervision.hierarchical=identity"]
    with pytest.raises(RecipeError, match="d1 makes one map"):
        read_recipe(changes=changes)
    read_recipe(changes=[*changes, "supervision.hierarchical=mean"])
    read_recipe(changes=["student.variant=tinyhd-s", *changes[1:]])


def test_label_sets_in_turn_need_a_term_each() -> None:
    labels = "supervision.labels=[{labels: a}, {labels: b, saliency: 0, hierarchical: 0}]"
    read_recipe(changes=[labels])
    with pytest.raises(RecipeError, match="label set 'b' has no weight"):
        read_recipe(changes=[labels, "supervision.mixing=one_per_batch"])


@pytest.mark.parametrize("name", presets())
def test_every_preset_builds(name: str) -> None:
    config = read_recipe(preset=name)
    variant = max((known for known in VARIANTS if name.startswith(known)), key=len)
    assert config.student == VARIANTS[variant]
    truth = config.supervision.ground_truth
    assert (truth is not None) == (name != variant)
    assert read_recipe(preset=name, changes=["student.size=64x96"]).student == replace(
        VARIANTS[variant], height=64, width=96
    )


def test_presets_are_the_papers() -> None:
    kinetics = read_recipe(preset="tinyhd-m-rc4-ucf-kinetics").sampling
    assert (kinetics.clips_per_video, kinetics.unlabelled, kinetics.validation_clips) == (1, 10, 20)
    alone = read_recipe(preset="tinyhd-s-dhf1k")
    assert (alone.sampling.clips_per_video, alone.sampling.unlabelled) == (2, None)
    assert alone.optimisation.batch_size == 2
    assert alone.optimisation.epochs == 200


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'tinyhd-s-dhf2k'; did you mean 'tinyhd-s-dhf1k'"):
        read_recipe(preset="tinyhd-s-dhf2k")


def test_single_values_are_nested_lists_and_numbers() -> None:
    config = read_recipe(
        changes=[
            "optimisation.learning_rate=1e-3",
            "optimisation.clip_gradient=5",
            "sampling.unlabelled=1",
            "supervision.labels=[{labels: hd2s, saliency: 5e-1}, {labels: tased, hierarchical: 0}]",
            "supervision.ground_truth.nss=1e-1",
            "supervision.assistant.checkpoint=a=b.pt",
            "student.single=[true, true, true]",
        ]
    )
    assert config.optimisation.learning_rate == 1e-3
    assert config.optimisation.clip_gradient == 5
    assert config.sampling.unlabelled == 1
    assert config.supervision.labels == (
        LabelTerm(labels="hd2s", saliency=0.5),
        LabelTerm(labels="tased", hierarchical=0),
    )
    assert config.supervision.ground_truth == GroundTruthTerm(nss=0.1)
    assert config.supervision.assistant == AssistantTerm(checkpoint="a=b.pt")


FULL = TrainConfig(
    student=build_config("tinyhd-m-rc2", height=64, width=96),
    start="früh.pt",
    supervision=Supervision(
        labels=(LabelTerm(labels="a", d2=0.5), LabelTerm(labels="b", hierarchical=0)),
        mixing="one_per_batch",
        assistant=AssistantTerm(checkpoint="yes", saliency=1e-7),
        ground_truth=GroundTruthTerm(data="null", cc=1.5),
        alignment="lagged",
    ),
    sampling=Sampling(unlabelled=2.5, holdout_of="videos", holdout=0),
    optimisation=Optimisation(learning_rate=1e-30, ema=0.999, schedule="cosine"),
    seed=12,
)


@pytest.mark.parametrize("config", [TrainConfig(), FULL])
def test_written_recipes_are_read_back(tmp_path: Path, config: TrainConfig) -> None:
    file = written(tmp_path / "recipe.yaml", write_recipe(config))
    assert read_recipe(file) == config


def test_later_values_are_laid_over_earlier_ones(tmp_path: Path) -> None:
    text = "student: {height: 64}\noptimisation: {epochs: 7, batch_size: 3}\nseed: 4"
    file = written(tmp_path / "recipe.yaml", text)
    changes = ["optimisation.epochs=9", "optimisation.epochs=8"]
    config = read_recipe(file, preset="tinyhd-m-rc4-ucf", changes=changes)
    assert config.student == build_config("tinyhd-m-rc4", height=64)
    assert config.sampling.clips_per_video == 11  # of the preset alone
    assert config.optimisation.precision == "float16"
    assert (config.optimisation.batch_size, config.seed) == (3, 4)
    assert config.optimisation.epochs == 8
    assert read_recipe(written(tmp_path / "empty.yaml", "# nothing\n")) == TrainConfig()


def test_later_variant_replaces_the_student_but_not_its_size(tmp_path: Path) -> None:
    """Also over a complete recipe, as every run leaves it."""
    file = written(tmp_path / "recipe.yaml", write_recipe(FULL))
    config = read_recipe(file, changes=["student.variant=tinyhd-m-rc4"])
    assert config.student == build_config("tinyhd-m-rc4", height=64, width=96)
    assert read_recipe(file, preset="tinyhd-s") == FULL
    short = written(tmp_path / "short.yaml", "student: tinyhd-s-rc2")
    config = read_recipe(short, changes=["student.size=32x64", "student.channel_reduction=8"])
    expected = build_config("tinyhd-s-rc2", height=32, width=64)
    assert config.student == replace(expected, channel_reduction=8)


DEEP = 100_000
BOMB = "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!python/object/apply:os.system ['touch harmed']", "could not determine a constr"),
        ("seed: !!python/name:os.system ''", "could not determine a constructor"),
        ("a: [" + "[" * DEEP, "too many levels"),
        ("start: " + "[" * 500 + "]" * 500, "too many levels"),
        ("a: {" * 300, "too many levels"),
        ("student: &a [*a]", "alias"),
        (f"k0: &a0 [x]\n{BOMB}", "alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "alias"),
        ("seed: 2001-99-99", "month must be"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("seed: [", "expected"),
        ("? [a]\n: 1", "unhashable"),
        ("- seed", "holds no keys, but list"),
        ("nothing", "holds no keys, but str"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("1: 2", "no key '1'"),
        ("start: " + "[" * 20 + "]" * 20, "start: .* is not allowed there; it is str"),
        ("start: {" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}", "start: .* it is str"),
    ],
)
def test_hostile_files_are_one_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(written(tmp_path / "recipe.yaml", text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not (tmp_path / "harmed").exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*none\.yaml: No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(RecipeError, match=r"binary\.yaml is no YAML"):
        read_recipe(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"seed: \x07")
    with pytest.raises(RecipeError, match=r"control\.yaml is no YAML"):
        read_recipe(tmp_path / "control.yaml")


def test_values_of_the_command_line_are_laid_over_those_of_stages() -> None:
    own = {"optimisation": {"epochs": 2, "batch_size": 3}, "supervision": {"ground_truth": None}}
    stages = [{"name": "a"}, {"name": "b", "student": "tinyhd-m", **own}]
    values = lay_over({"stages": stages, "seed": 1}, {"optimisation": {"epochs": 9}})
    assert values["optimisation"] == {"epochs": 9}
    assert values["stages"][1]["optimisation"] == {"epochs": 9, "batch_size": 3}
    assert values["stages"][0] == {"name": "a"}
    values = lay_over(values, {"supervision": {"ground_truth": {"data": "DHF1K"}}})
    assert values["supervision"]["ground_truth"] == {"data": "DHF1K"}
    assert values["stages"][1]["supervision"] == {"ground_truth": None}  # it wants none
    values = lay_over(values, {"student": {"variant": "tinyhd-s"}})
    assert values["stages"][1]["student"] == {"variant": "tinyhd-s"}


def test_options_of_a_label_set_change_the_one_that_there_is() -> None:
    values = {"supervision": {"labels": [{"labels": "hd2s", "d2": 0.3}], "flip": "none"}}
    changed = change_label_set(values, {"hierarchical": 0})
    assert changed["supervision"] == {
        "labels": [{"labels": "hd2s", "d2": 0.3, "hierarchical": 0}],
        "flip": "none",
    }
    assert change_label_set({}, {"saliency": 2})["supervision"] == {"labels": [{"saliency": 2}]}
    online = put_online(changed, {"teacher": "hd2s"})["supervision"]
    assert online["labels"] == []
    assert online["online"] == {"d2": 0.3, "hierarchical": 0, "teacher": "hd2s"}
    for labels, message in (
        ([{"labels": "a"}, {"labels": "b"}], "a recipe with one label set"),
        (["a"], r"supervision\.labels\[0\]: 'a' is not allowed there; it is a mapping"),
    ):
        with pytest.raises(RecipeError, match=message):
            change_label_set({"supervision": {"labels": labels}}, {"saliency": 2})
    with pytest.raises(RecipeError, match=r"supervision\.labels\[0\]: 'a' is not allowed"):
        build_recipe({"supervision": {"labels": ["a"]}})
    with pytest.raises(RecipeError, match="change a recipe of one stage"):
        put_online({"stages": []}, {"teacher": "hd2s"})

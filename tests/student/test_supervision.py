from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stores.errors import DamagedStoreError, LabelSetNotFoundError
from stores.targets import TargetStore
from student.checkpoints import save_checkpoint
from student.clips import Batch, ClipDataset, load_batches
from student.config import TinyHDConfig, build_config
from student.losses import Term, add_terms
from student.pools import ClipKey
from student.recipe import (
    AssistantTerm,
    GroundTruthTerm,
    LabelTerm,
    Sampling,
    Supervision,
    TrainConfig,
)
from student.supervision import (
    LabelSource,
    Supervisor,
    ask_assistant,
    describe_content,
    find_recorded,
    find_sources,
    flips,
    load_assistant,
    render_batch,
    target_lag,
)
from student.tinyhd import StudentOutput, TinyHD, normalise_frames
from tests.student.counting import (
    HEIGHT,
    PER_KIND,
    WIDTH,
    add_labels,
    counting_request,
    make_store,
    record_eyes,
    told_by,
)

CPU = torch.device("cpu")
S = TinyHDConfig(channel_reduction=8, height=HEIGHT, width=WIDTH)
M = replace(S, single=(True, False, False), output_frames=16)
M_EVERY = replace(M, single=(False, False, False))
TOY, TWIN, OTHER = (
    counting_request(),
    counting_request(variant="hflip"),
    counting_request("other"),
)
FIRST = {"twin": 1000, "other": 2000}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("supervision") / "targets.zarr"
    sets = [(TOY, 0), (TWIN, FIRST["twin"]), (OTHER, FIRST["other"])]
    return make_store(path, {"a": 48, "b": 32}, sets).url


def recipe(student: TinyHDConfig = S, **supervision: Any) -> TrainConfig:  # noqa: ANN401
    labels = supervision.pop("labels", (LabelTerm(labels="toy"),))
    return TrainConfig(student=student, supervision=Supervision(labels=labels, **supervision))


def read(url: str, config: TrainConfig, *keys: ClipKey) -> tuple[list[LabelSource], Batch]:
    store = TargetStore.open(url)
    sources = find_sources(store, config.supervision)
    content = describe_content(config, sources, find_recorded(store, config.supervision))
    (batch,) = load_batches(ClipDataset(url, content), keys, batch_size=len(keys))
    return sources, batch


def saliency_of(sources: list[LabelSource], batch: Batch, number: int = 0) -> Tensor:
    layout = sources[number].layout
    return render_batch(batch.planes[number], layout, (), HEIGHT, WIDTH, CPU).saliency


@pytest.mark.parametrize(
    ("student", "alignment", "expected"),
    [
        (S, "aligned", [20]),
        (S, "lagged", [20]),  # the paper's lag is that of TinyHD-M
        (M, "aligned", range(5, 21)),
        (M, "lagged", range(4, 20)),
        (replace(M, output_frames=8), "aligned", range(13, 21)),
        (replace(M, output_frames=8), "lagged", range(12, 20)),
    ],
)
def test_targets_are_of_the_frames_that_are_mapped(
    url: str, student: TinyHDConfig, alignment: str, expected: range
) -> None:
    sources, batch = read(url, recipe(student, alignment=alignment), ClipKey("a", 20))
    assert told_by(saliency_of(sources, batch)).tolist() == [list(expected)]
    assert batch.frames[0, :, 0, 0, 0].tolist() == list(range(5, 21))


def test_hierarchical_maps_come_in_their_order(url: str) -> None:
    sources, batch = read(url, recipe(M), ClipKey("a", 20), ClipKey("b", 31))
    layout = sources[0].layout
    maps = render_batch(batch.planes[0], layout, layout.hierarchical, HEIGHT, WIDTH, CPU)
    assert maps.hierarchical is not None
    assert maps.hierarchical.shape == (2, 4, 16, HEIGHT, WIDTH)
    for kind in range(4):
        numbers = told_by(maps.hierarchical[:, kind]) - PER_KIND * (kind + 1)
        assert numbers.tolist() == [list(range(5, 21)), list(range(16, 32))]


def test_mirrored_clips_take_the_twins_targets(url: str) -> None:
    """What the teacher said of mirrored frames is not mirrored again."""
    keys = ClipKey("a", 20), ClipKey("a", 20, is_flipped=True)
    config = recipe()
    sources, batch = read(url, config, *keys)
    assert flips(sources, config.supervision)
    assert told_by(saliency_of(sources, batch)).tolist() == [[20], [1020]]
    torch.testing.assert_close(batch.frames[1], batch.frames[0].flip(2))
    assert batch.frames[1, -1, 0, 0, 0] == 255 - 20


def test_mirrored_targets_where_that_is_asked_for(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ClipKey("a", 20), ClipKey("a", 20, is_flipped=True)
    config = recipe(M, flip="mirror")
    sources, batch = read(url, config, *keys)
    assert flips(sources, config.supervision)
    assert "--variant both" in caplog.text
    maps = saliency_of(sources, batch)
    torch.testing.assert_close(maps[1], maps[0].flip(-1))
    assert told_by(maps)[1].tolist() == [-number for number in range(5, 21)]


def test_clips_are_not_mirrored_without_a_twin(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = recipe(labels=(LabelTerm(labels="toy"), LabelTerm(labels="other")))
    sources = find_sources(TargetStore.open(url), config.supervision)
    assert not flips(sources, config.supervision)
    assert "teacher of other-identity" in caplog.text
    assert "--variant hflip" in caplog.text
    assert not flips(sources, replace(config.supervision, flip="none"))


def test_label_set_that_shares_its_name_with_its_twin_is_found(tmp_path: Path) -> None:
    """Also without a name: that is how the store of one teacher is trained from."""
    store = make_store(tmp_path / "t.zarr", {"a": 32}, [(TOY, 0), (TWIN, 1000)])
    for name in ("", "toy", TOY.name):
        (source,) = find_sources(store, Supervision(labels=(LabelTerm(labels=name),)))
        assert source.labels.name == TOY.name
        assert source.twin is not None
        assert source.twin.name == TWIN.name
    with pytest.raises(ValueError, match=rf"{TWIN.name} is of mirrored frames"):
        find_sources(store, Supervision(labels=(LabelTerm(labels=TWIN.name),)))
    with pytest.raises(LabelSetNotFoundError):
        find_sources(store, Supervision(labels=(LabelTerm(labels="hd2s"),)))


def test_twin_without_any_targets_is_none(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t.zarr", {"a": 32}, [(TOY, 0)])
    store.ensure_set(TWIN, {})
    (source,) = find_sources(TargetStore.open(store.url), Supervision())
    assert source.twin is None


def test_damaged_twin_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t.zarr", {"a": 32}, [(TOY, 0), (TWIN, 0)])
    (tmp_path / "t.zarr" / TWIN.key / "zarr.json").write_text("{}")
    with pytest.raises(DamagedStoreError):
        find_sources(TargetStore.open(store.url), Supervision(labels=(LabelTerm(labels=TOY.name),)))


def fake_output(config: TinyHDConfig, clips: int) -> StudentOutput:
    """A student's output for clips, at random."""
    torch.manual_seed(0)
    frames = config.output_frames
    shape = (clips, 1, frames, HEIGHT, WIDTH) if config.is_multi else (clips, 1, HEIGHT, WIDTH)
    maps: dict[str, Tensor] = {
        name: torch.randn(
            clips,
            4 if name == "d1" else 1,
            1 if config.is_single(name) else frames,
            HEIGHT,
            WIDTH,
        )
        for name in config.decoders
    }
    return StudentOutput(torch.randn(shape), maps)


def plain_kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL of each pair of maps, as one writes it down."""
    p = logits.double().sigmoid()
    q, p = (
        target.double() / target.double().sum((-2, -1), keepdim=True),
        p / p.sum((-2, -1), keepdim=True),
    )
    return (q * (q / p).log()).sum((-2, -1)).float()


def terms_of(url: str, config: TrainConfig, *keys: ClipKey) -> tuple[dict[str, Term], Batch, Any]:
    sources, batch = read(url, config, *keys)
    output = fake_output(config.student, len(keys))
    clips = normalise_frames(batch.frames)
    assistant = config.supervision.assistant
    model = load_assistant(assistant, config, "cpu") if assistant is not None else None
    supervisor = Supervisor(config, sources, model)
    terms = supervisor.terms(output, batch, supervisor.targets(batch, clips))
    return terms, batch, (sources, output, model)


KEYS = ClipKey("a", 20), ClipKey("b", 31)


@pytest.mark.parametrize("student", [S, M, M_EVERY])
def test_terms_are_the_divergences_of_the_maps(url: str, student: TinyHDConfig) -> None:
    weights = LabelTerm(labels="toy", d2=0.5, d3=0.25)
    terms, batch, (sources, output, _) = terms_of(url, recipe(student, labels=(weights,)), *KEYS)
    assert list(terms) == [f"toy/{name}" for name in ("saliency", "hierarchical", "d2", "d3")]
    layout = sources[0].layout
    maps = render_batch(batch.planes[0], layout, layout.hierarchical, HEIGHT, WIDTH, CPU)
    assert maps.hierarchical is not None
    frames = student.output_frames
    fused = output.saliency_logits.reshape(2, frames, HEIGHT, WIDTH)
    expected = {"toy/saliency": plain_kl(maps.saliency, fused).mean()}
    hierarchical = maps.hierarchical
    if student.single[0]:
        hierarchical = hierarchical.mean(2, keepdim=True)
    found = plain_kl(hierarchical, output.map_logits["d1"])
    expected["toy/hierarchical"] = found.mean((0, 2)).sum()
    for name in ("d2", "d3"):
        logits = output.map_logits[name][:, 0]
        expected[f"toy/{name}"] = plain_kl(maps.saliency, logits).mean()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].value, value, rtol=1e-4, atol=1e-4)
    scale = {"toy/saliency": 1, "toy/hierarchical": 1, "toy/d2": 0.5, "toy/d3": 0.25}
    total = sum(scale[name] * value for name, value in expected.items())
    torch.testing.assert_close(add_terms(terms).total, total, rtol=1e-4, atol=1e-4)


def test_several_label_sets_are_summed(url: str) -> None:
    labels = (LabelTerm(labels="toy"), LabelTerm(labels="other", saliency=0.5, hierarchical=0))
    terms, _, _ = terms_of(url, recipe(labels=labels, flip="none"), *KEYS)
    assert list(terms) == ["toy/saliency", "toy/hierarchical", "other/saliency"]
    alone, _, _ = terms_of(url, recipe(labels=labels[:1]), *KEYS)
    torch.testing.assert_close(
        add_terms(terms).total,
        add_terms(alone).total + 0.5 * terms["other/saliency"].value,
    )


def test_one_label_set_of_a_batch_in_turn(url: str) -> None:
    labels = (LabelTerm(labels="toy"), LabelTerm(labels="other", hierarchical=0))
    config = recipe(labels=labels, mixing="one_per_batch", flip="none")
    for source, names in enumerate((["toy/saliency", "toy/hierarchical"], ["other/saliency"])):
        keys = [key._replace(source=source) for key in KEYS]
        terms, batch, _ = terms_of(url, config, *keys)
        assert list(terms) == names
        assert [bool(planes) for planes in batch.planes] == [source == 0, source == 1]


def test_two_label_sets_of_one_teacher_are_told_apart(tmp_path: Path) -> None:
    one, two = counting_request(window=1), counting_request(window=2)
    store = make_store(tmp_path / "t.zarr", {"a": 32}, [(one, 0), (two, 0)])
    labels = (LabelTerm(labels=one.name), LabelTerm(labels=two.name))
    sources = find_sources(store, Supervision(labels=labels))
    assert [source.name for source in sources] == [one.name, two.name]


def test_teacher_without_hierarchical_maps_is_refused(tmp_path: Path) -> None:
    request = counting_request()
    plain = replace(request, layout=replace(request.layout, hierarchical=()))
    store = make_store(tmp_path / "t.zarr", {"a": 32}, [(plain, 0)])
    with pytest.raises(ValueError, match=r"0 hierarchical maps.*--hierarchical-weight 0"):
        find_sources(store, Supervision())
    find_sources(store, Supervision(labels=(LabelTerm(hierarchical=0),)))


@pytest.fixture
def eyes(url: str, tmp_path: Path) -> str:
    frames = {"a": [0, *range(15, 48)]}
    return str(record_eyes(TargetStore.open(url), tmp_path / "eyes", frames))


def test_recorded_eyes_are_only_where_a_video_has_them(url: str, eyes: str) -> None:
    weights = GroundTruthTerm(data=eyes, kl=1, cc=0.5, nss=0.1, d2=0.5)
    config = recipe(M, ground_truth=weights)
    key = ClipKey("a", 20)
    terms, batch, (_, output, _) = terms_of(url, config, key, ClipKey("b", 31))
    names = ("kl", "cc", "nss", "d2")
    assert list(terms)[2:] == [f"ground_truth/{name}" for name in names]
    assert batch.density is not None
    assert batch.fixations is not None
    is_seen = batch.density.amax((-2, -1)) > 0
    assert is_seen.tolist() == [[False] * 10 + [True] * 6, [False] * 16]  # frames 15 to 20 of a
    assert batch.fixations[0, 15].nonzero().tolist() == [[0, 20]]
    assert batch.fixations.sum() == 6
    assert {name: float(term.counts) for name, term in terms.items() if "truth" in name} == {
        f"ground_truth/{name}": 6.0 for name in names
    }
    density, fused = batch.density[0, 10:], output.saliency_logits[0, 0, 10:]
    q = density / density.sum((-2, -1), keepdim=True)
    prediction = fused.sigmoid()
    p = prediction / prediction.sum((-2, -1), keepdim=True)
    expected = torch.where(q > 0, q * (q / p).log(), 0.0).sum((-2, -1)).mean()
    torch.testing.assert_close(terms["ground_truth/kl"].value, expected)
    pairs = zip(density, prediction, strict=True)
    cc = [1 - torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in pairs]
    torch.testing.assert_close(terms["ground_truth/cc"].value, torch.stack(cc).mean())
    deviation = prediction.std((-2, -1), keepdim=True)
    scores = (prediction - prediction.mean((-2, -1), keepdim=True)) / deviation
    expected = -scores[batch.fixations[0, 10:]].mean()  # one fixation in each frame
    torch.testing.assert_close(terms["ground_truth/nss"].value, expected)


def test_recorded_eyes_are_mirrored_with_their_clip(url: str, eyes: str) -> None:
    truth = GroundTruthTerm(data=eyes, nss=1)
    for flip in ("labels", "mirror"):
        config = recipe(ground_truth=truth, flip=flip)
        key = ClipKey("a", 20)
        _, batch = read(url, config, key, key._replace(is_flipped=True))
        assert batch.density is not None
        assert batch.fixations is not None
        torch.testing.assert_close(batch.density[1], batch.density[0].flip(-1))
        assert batch.fixations[:, 0].nonzero().tolist() == [[0, 0, 20], [1, 0, WIDTH - 1 - 20]]


def test_black_maps_say_nothing(url: str, tmp_path: Path) -> None:
    eyes = record_eyes(TargetStore.open(url), tmp_path / "black", {"a": [0, 15]})
    store = TargetStore.open(url)
    config = recipe(M, ground_truth=GroundTruthTerm(data=str(eyes)))
    found = find_recorded(store, config.supervision)
    assert list(found) == ["a"]
    _, batch = read(url, config, ClipKey("a", 15))
    assert batch.density is not None
    assert batch.fixations is None  # NSS is not asked for
    assert (batch.density[0].amax((-2, -1)) > 0).tolist() == [False] * 15 + [True]


def test_lag_is_that_of_the_teacher_alone(url: str, eyes: str) -> None:
    config = recipe(M, alignment="lagged", ground_truth=GroundTruthTerm(data=eyes, nss=1))
    assert target_lag(config) == 1
    sources, batch = read(url, config, ClipKey("a", 40))
    assert told_by(saliency_of(sources, batch))[0, -1] == 39
    assert batch.fixations is not None
    assert batch.fixations[0, -1].nonzero().tolist() == [[0, 40]]


def test_recorded_eyes_that_are_not_there_are_an_error(url: str, tmp_path: Path) -> None:
    store = TargetStore.open(url)
    with pytest.raises(ValueError, match="does not say where they are"):
        find_recorded(store, Supervision(ground_truth=GroundTruthTerm()))
    other = make_store(tmp_path / "t.zarr", {"c": 32}, [(TOY, 0)])
    eyes = record_eyes(other, tmp_path / "eyes", {"c": [3]})
    with pytest.raises(ValueError, match="recorded eyes of no video"):
        find_recorded(store, Supervision(ground_truth=GroundTruthTerm(data=str(eyes))))


def saved(path: Path, config: TinyHDConfig) -> tuple[str, TinyHD]:
    torch.manual_seed(1)
    model = TinyHD(config)
    save_checkpoint(path, model)
    return str(path), model.eval()


@pytest.mark.parametrize(
    ("student", "assistant"),
    [(S, S), (S, M), (S, M_EVERY), (M, M), (M, M_EVERY), (M_EVERY, M_EVERY)],
)
def test_assistant_looks_at_the_students_clips(
    url: str, tmp_path: Path, student: TinyHDConfig, assistant: TinyHDConfig
) -> None:
    path, model = saved(tmp_path / "wide.pt", replace(assistant, channel_reduction=4))
    term = AssistantTerm(checkpoint=path, d2=1)
    config = recipe(student, labels=(), assistant=term)
    keys = KEYS[0], KEYS[0]._replace(is_flipped=True)
    terms, batch, (sources, output, loaded) = terms_of(url, config, *keys)
    assert not sources
    assert list(terms) == ["assistant/saliency", "assistant/hierarchical", "assistant/d2"]
    assert batch.planes == ()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    with torch.no_grad():
        theirs = model(normalise_frames(batch.frames))
    frames = student.output_frames
    every = theirs.saliency.reshape(2, -1, HEIGHT, WIDTH)[:, -frames:]
    fused = output.saliency_logits.reshape(2, frames, HEIGHT, WIDTH)
    expected = plain_kl(every, fused).mean()
    torch.testing.assert_close(terms["assistant/saliency"].value, expected, rtol=1e-4, atol=1e-5)
    maps = theirs.maps["d1"][:, :, -frames:]
    if student.single[0]:
        maps = maps.mean(2, keepdim=True)
    expected = plain_kl(maps, output.map_logits["d1"]).mean((0, 2)).sum()
    found = terms["assistant/hierarchical"].value
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_assistants_that_say_too_little_are_refused(tmp_path: Path) -> None:
    def load(theirs: TinyHDConfig, ours: TinyHDConfig, **weights: float) -> None:
        path, _ = saved(tmp_path / "wide.pt", theirs)
        term = AssistantTerm(checkpoint=path, **weights)
        load_assistant(term, recipe(ours, labels=(), assistant=term), "cpu")

    with pytest.raises(ValueError, match=r"maps 1 frames of a clip, the student 16.*distill"):
        load(S, M)
    with pytest.raises(ValueError, match=r"has no decoder d1.*weight 0"):
        load(replace(S, decoders=("d2",), single=(True,)), S)
    with pytest.raises(ValueError, match=r"one hierarchical map .* for a whole clip.*weight 0"):
        load(M, M_EVERY)
    load(M, M_EVERY, hierarchical=0)


def test_assistant_of_few_bits_keeps_small_values(tmp_path: Path) -> None:
    model = TinyHD(S).eval()
    torch.nn.init.constant_(model.fusion.weight, 0)
    torch.nn.init.constant_(model.fusion.get_parameter("bias"), -30.0)
    clips = torch.zeros(1, 3, 16, HEIGHT, WIDTH)
    with torch.autocast("cpu", dtype=torch.float16):
        maps = ask_assistant(model, clips, 1)
    torch.testing.assert_close(maps.saliency, torch.full_like(maps.saliency, -30.0).sigmoid())


def test_assistant_of_another_size_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = saved(tmp_path / "wide.pt", build_config("tinyhd-s-rc4"))
    term = AssistantTerm(checkpoint=path)
    load_assistant(term, recipe(labels=(), assistant=term), "cpu")
    assert "was trained on frames of 192x256, and looks at 32x64" in caplog.text


def test_clips_of_recorded_eyes_travel_to_workers(url: str, eyes: str) -> None:
    config = recipe(ground_truth=GroundTruthTerm(data=eyes, nss=1))
    store = TargetStore.open(url)
    sources = find_sources(store, config.supervision)
    content = describe_content(config, sources, find_recorded(store, config.supervision))
    dataset = ClipDataset(url, content)
    here = dataset[ClipKey("a", 30)]
    there = pickle.loads(pickle.dumps(dataset))[ClipKey("a", 30)]
    assert (here.density == there.density).all()
    assert (here.fixations == there.fixations).all()


def test_twins_have_to_be_there_for_mirrored_clips(tmp_path: Path) -> None:
    """Clips are drawn where both are labelled."""
    from student.job import _find_pools

    store = make_store(tmp_path / "t.zarr", {"a": 64}, [(TOY, 0)])
    add_labels(store, TWIN, {"a": range(1, 3)})
    config = TrainConfig(student=S, sampling=Sampling(holdout=0))
    sources = find_sources(store, config.supervision)
    both = _find_pools(TargetStore.open(store.url), config, sources, is_flipping=True)
    assert both.training == {"a": [range(16, 48)]}
    alone = _find_pools(TargetStore.open(store.url), config, sources, is_flipping=False)
    assert alone.training == {"a": [range(15, 64)]}


def test_terms_of_all_sources_are_told_apart(tmp_path: Path) -> None:
    """Labels that an assistant made, and an assistant in the step."""
    request = counting_request("assistant")
    store = make_store(tmp_path / "t.zarr", {"a": 48}, [(request, 0)])
    path = tmp_path / "assistant.pt"
    save_checkpoint(path, TinyHD(S))
    config = recipe(
        labels=(LabelTerm(),), assistant=AssistantTerm(checkpoint=str(path)), flip="none"
    )
    terms, _, _ = terms_of(store.url, config, ClipKey("a", 20))
    names = [request.name, "assistant"]
    assert list(terms) == [f"{n}/{kind}" for n in names for kind in ("saliency", "hierarchical")]


def test_one_label_set_under_two_names_is_refused(url: str) -> None:
    store = TargetStore.open(url)
    labels = (LabelTerm(labels="toy"), LabelTerm(labels=store.label_set("toy-identity").name))
    with pytest.raises(ValueError, match=r"names the label set toy-identity-.* twice"):
        find_sources(store, Supervision(labels=labels))

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery, draw_batch
from lit_safety.drawing.pipelines import load_pipeline
from tests.helpers.flow_pipelines import FAMILIES, save_flow

SETTINGS = DrawingSettings(steps=2, guidance=3.0, batch_size=2)


@pytest.fixture(scope="module")
def pipe(pipeline: Path):
    return load_pipeline(pipeline, Arm(), "cpu")


def draw(folder: Path, pipe, prompts, settings: DrawingSettings = SETTINGS, **identity: object) -> Gallery:
    gallery = Gallery(folder, "base", {"weights": "a", **identity}, prompts, settings)
    gallery.draw(pipe, None, lambda _: None)
    return gallery


def pixels(gallery: Gallery) -> list[bytes]:
    return [Image.open(drawn.path).tobytes() for drawn in gallery.all()]


def test_a_image_depends_on_its_own_seed_only(pipe, small_set) -> None:
    """The same rows in another order and another batch give the same images up to the last digits."""
    forward = draw_batch(pipe, small_set, SETTINGS)
    backward = draw_batch(pipe, small_set[::-1], SETTINGS)[::-1]
    alone = np.concatenate([draw_batch(pipe, [prompt], SETTINGS) for prompt in small_set])
    assert np.allclose(forward, backward, atol=1e-4)
    assert np.allclose(forward, alone, atol=1e-4)
    assert not np.allclose(forward[0], forward[1], atol=1e-2)


def test_a_killed_run_goes_on_to_the_same_pixels(pipe, small_set, tmp_path: Path) -> None:
    whole = draw(tmp_path / "whole", pipe, small_set)
    cut = draw(tmp_path / "cut", pipe, small_set)
    kept = cut.all()[2].path
    age = kept.stat().st_mtime_ns
    cut.all()[3].path.unlink()
    broken = cut.all()[4].path
    broken.write_bytes(broken.read_bytes()[:60])
    assert [list(batch) for batch in cut.missing()] == [[2, 3], [4, 5]]
    draw(tmp_path / "cut", pipe, small_set)
    assert pixels(cut) == pixels(whole)
    assert kept.stat().st_mtime_ns == age, "an image that was there is not written again"


def test_the_number_of_workers_changes_no_pixel(pipe, small_set, tmp_path: Path) -> None:
    one = draw(tmp_path / "one", pipe, small_set, replace(SETTINGS, workers=1))
    three = draw(tmp_path / "three", pipe, small_set, replace(SETTINGS, workers=3))
    assert pixels(one) == pixels(three)
    assert one.folder.name == three.folder.name


def test_an_error_in_one_batch_ends_the_run_and_keeps_the_threads(pipe, small_set, tmp_path: Path, monkeypatch) -> None:
    """The second of three batches fails: the first one's images stay, the number of threads is as before."""

    def fail(row: int, pixels: np.ndarray) -> None:
        if row == 2:
            raise UserError("disk full")
        Gallery._keep(gallery, row, pixels)

    gallery = Gallery(tmp_path, "base", {}, small_set, replace(SETTINGS, workers=1))
    gallery._keep = fail  # type: ignore[method-assign]
    torch.set_num_threads(2)
    with pytest.raises(UserError, match="disk full"):
        gallery.draw(pipe, None, lambda _: None)
    assert torch.get_num_threads() == 2
    there = {path.name for path in tmp_path.rglob("*.png")}
    assert {"00000.png", "00001.png"} <= there
    assert "00002.png" not in there


def test_progress_counts_every_image_once(pipe, small_set, tmp_path: Path) -> None:
    gallery = draw(tmp_path, pipe, small_set)
    gallery.all()[0].path.unlink()
    ticks: list[int] = []
    gallery.draw(pipe, None, ticks.append)
    assert ticks == [4, 2]


def test_other_weights_prompts_or_settings_never_share_images(small_set, tmp_path: Path) -> None:
    variants = [
        Gallery(tmp_path, "base", {"weights": "a"}, small_set, SETTINGS),
        Gallery(tmp_path, "base", {"weights": "b"}, small_set, SETTINGS),
        Gallery(tmp_path, "base", {"weights": "a"}, small_set[:-1], SETTINGS),
        Gallery(tmp_path, "base", {"weights": "a"}, small_set[::-1], SETTINGS),
        Gallery(tmp_path, "base", {"weights": "a"}, small_set, DrawingSettings(3, 3.0, batch_size=2)),
        Gallery(tmp_path, "base", {"weights": "a"}, small_set, DrawingSettings(2, 4.0, batch_size=2)),
    ]
    assert len({gallery.folder for gallery in variants}) == len(variants)


def test_images_carry_what_made_them(pipe, small_set, tmp_path: Path) -> None:
    gallery = draw(tmp_path, pipe, small_set)
    with Image.open(gallery.all()[1].path) as image:
        assert image.text["prompt"] == small_set[1].prompt
        assert '"seed": 2' in image.text["row"]
        assert '"guidance": 3.0' in image.text["settings"]
    assert not list(tmp_path.rglob("*.partial"))


class NanPipe:
    """Draws grey, and NaN for the second image of a batch."""

    def __call__(self, prompt: list[str], **_: object):
        images = np.full((len(prompt), 8, 8, 3), 0.5, dtype=np.float32)
        images[1, 0, 0, 0] = np.nan
        return type("Output", (), {"images": images})


def test_a_image_that_is_not_finite_is_an_error_not_a_black_square(small_set, tmp_path: Path) -> None:
    gallery = draw(tmp_path, NanPipe(), small_set[:2])
    good, bad = gallery.all()
    assert good.error is None
    assert "not finite" in (bad.error or "")
    assert not bad.path.exists()
    assert gallery.missing() == [], "drawing it again would give the same"


def test_a_full_disk_says_how_to_go_on(pipe, small_set, tmp_path: Path, monkeypatch) -> None:
    def full(self: Path, _: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"00000\.png: .*No space left.*the same command"):
        draw(tmp_path, pipe, small_set)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"steps": 0}, "--steps 0"), ({"guidance": float("nan")}, "--guidance nan"), ({"guidance": -1.0}, "--guidance"),
     ({"batch_size": 0}, "--batch_size 0"), ({"resolution": 4}, "--resolution 4")],
)  # fmt: skip
def test_settings_nobody_can_draw_with(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        DrawingSettings(**settings)


def test_what_a_pipeline_does_not_take_is_one_line(pipe, small_set) -> None:
    with pytest.raises(UserError, match=r"StableDiffusionPipeline .*divisible by 8"):
        draw_batch(pipe, small_set[:1], DrawingSettings(steps=1, resolution=33))


def test_a_row_s_own_guidance_comes_first(pipe, ask) -> None:
    """Rows 1 and 2 draw at 5, whatever rows are next to them; the run's guidance is 2."""
    plain = [ask("clean", benign="car", seed=seed) for seed in range(3)]
    own = [plain[0], replace(plain[1], guidance=5.0), replace(plain[2], guidance=5.0)]
    at = {scale: DrawingSettings(steps=2, guidance=scale) for scale in (2.0, 5.0)}
    mixed = draw_batch(pipe, own, at[2.0])
    assert np.allclose(mixed[:1], draw_batch(pipe, plain[:1], at[2.0]), atol=1e-5)
    assert np.allclose(mixed[1:], draw_batch(pipe, plain[1:], at[5.0]), atol=1e-5)
    assert not np.allclose(mixed[1:], draw_batch(pipe, plain[1:], at[2.0]), atol=1e-3)


def test_what_was_written_is_listed_without_another_look(pipe, small_set, tmp_path: Path, monkeypatch) -> None:
    """Images that this command wrote are whole; those of another one are decoded once."""
    drawn = draw(tmp_path, pipe, small_set)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(path) or original(path, *rest))
    assert all(one.error is None for one in drawn.all())
    assert opened == []
    later = Gallery(tmp_path, "base", {"weights": "a"}, small_set, SETTINGS)
    assert later.folder == drawn.folder
    assert later.missing() == []
    later.all()
    assert len(opened) == len(small_set)


def test_an_image_that_cannot_be_written_ends_the_drawing(pipe, small_set, tmp_path: Path, monkeypatch) -> None:
    """The third write fails, in a thread: the error is the command's, images before it stay, no part of one does."""
    from lit_safety.drawing import gallery as module

    original, written = module._write, []

    def fails(path: Path, content: bytes) -> None:
        if path.name == "00002.png":
            raise UserError(f"{path}: cannot be written (no space)")
        original(path, content)
        written.append(path.name)

    monkeypatch.setattr(module, "_write", fails)
    with pytest.raises(UserError, match=r"00002\.png: cannot be written"):
        draw(tmp_path, pipe, small_set, replace(SETTINGS, workers=1))
    assert {"00000.png", "00001.png"} <= set(written)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_interrupt_finishes_what_is_being_written_and_begins_nothing() -> None:
    """Both threads are writing when Ctrl-C comes: their two images end whole, the six that wait are not begun."""
    from threading import Event, Timer

    from lit_safety.drawing.threads import WRITERS, Writers

    begun, go, done = [Event() for _ in range(8)], Event(), []

    def slow(number: int) -> None:
        begun[number].set()
        go.wait(30)
        done.append(number)

    def stopped() -> None:
        with Writers(10) as writers:
            for number in range(8):
                writers.write(slow, number)
            for number in range(WRITERS):
                begun[number].wait(30)
            Timer(0.2, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert sorted(done) == list(range(WRITERS))


def test_no_more_images_wait_than_were_allowed() -> None:
    from threading import Event, Thread

    from lit_safety.drawing.threads import Writers

    go, handed = Event(), []

    def hand_over() -> None:
        with Writers(2) as writers:
            for number in range(3):
                writers.write(lambda _: go.wait(30), number)
                handed.append(number)

    thread = Thread(target=hand_over)
    thread.start()
    thread.join(0.5)
    assert handed == [0, 1]
    go.set()
    thread.join(30)
    assert handed == [0, 1, 2]


class FirstInput:
    """Notes the first latents that a pipeline's denoiser gets."""

    def __init__(self, pipe) -> None:
        self.denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def __enter__(self) -> "FirstInput":
        self.found: list[torch.Tensor] = []
        self.hook = self.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, _, args: tuple, named: dict) -> None:
        given = next(iter([*args, *([named["hidden_states"]] if "hidden_states" in named else [])]))
        self.found.append(torch.stack(given) if isinstance(given, list) else given.clone())

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("family", ["stable diffusion", *FAMILIES])
def test_a_temperature_multiplies_the_noise_that_a_stock_pipeline_begins_from(
    family: str, tiny_pipeline: Path, tmp_path: Path, ask
) -> None:
    """0.5 loses no bit: what the denoiser gets first is half of what it gets without. Afterwards the pipeline draws as
    before."""
    folder = tiny_pipeline if family == "stable diffusion" else save_flow(family, tmp_path / family)
    pipe = load_pipeline(folder, Arm())
    settings, rows = DrawingSettings(steps=2, guidance=1.0, resolution=64), [ask("a red cat", seed) for seed in (3, 4)]

    def first(temperature: float) -> tuple[torch.Tensor, np.ndarray]:
        with FirstInput(pipe) as noted:
            drawn = draw_batch(pipe, rows, settings, temperature=temperature)
        return noted.found[0], drawn

    (plain, before), (half, other), (again, after) = first(1.0), first(0.5), first(1.0)
    assert plain.abs().max() > 0
    assert torch.equal(half, plain * 0.5)
    assert torch.equal(again, plain)
    assert np.array_equal(before, after)
    assert not np.array_equal(before, other)

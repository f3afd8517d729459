"""Frames per second of the SAM 2 engine beside the official predictor, transformers, ultralytics.

Every side tracks the same boxes in the same frames with a tiny network, in one process, and the
sides take turns frame by frame. What is timed is the steady state, in which seven memories and
sixteen pointers are attended to. To reach it at once, each side's first tracked frame is entered
into its memory as the frames that follow it; the work of a frame depends on how many memories there
are, not on what is in them. For the same reason transformers has random weights.

    python tests/benchmarks/engine_speed.py cpu [--rows 1024x1 512x2 ...] [--rounds 3]
    python tests/benchmarks/engine_speed.py long            # SAM2Long against a single pathway
    python tests/benchmarks/engine_speed.py agreement       # masks of bfloat16 against float32
    python tests/benchmarks/engine_speed.py memory [--lengths 200 2000 20000]
    python tests/benchmarks/engine_speed.py gpu             # without Ray; torch, numpy and sam2

``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BOXES = [
    [300, 0, 515, 395],
    [165, 130, 290, 410],
    [0, 0, 200, 300],
    [500, 100, 760, 420],
    [600, 250, 900, 520],
]
FIRST_STEADY = 16
"""Frames before the timed ones; the sixteenth pointer is there then."""
ROWS = ["1024x1", "1024x5", "512x1", "512x2", "512x5"]
ROOFLINE_FLOPS = 790e12
"""Dense bfloat16 products measured on one H200."""
TINY_GFLOP = 292, 621
"""Of the image encoder, and of each object, at 1024 pixels."""

Step = Callable[[], None]


def reference_data(folder: Path) -> tuple[Path, list[Any]]:
    """Return weights and 24 frames: the reference ones, or random ones where those are missing."""
    try:
        from tests.engine import reference

        return reference.checkpoint(), list(reference.frames())
    except BaseException as error:
        print(f"no reference data ({error or type(error).__name__}): random weights and frames")
    import torch

    from workers.engine.model import CheckpointInfo, build_network

    torch.manual_seed(0)
    path = folder / "sam2.1_hiera_tiny.pt"
    state = build_network(CheckpointInfo("tiny", "2.1", True), 1024).state_dict()
    torch.save({"model": state}, path)
    return path, list(np.random.default_rng(0).integers(0, 255, (24, 540, 960, 3), np.uint8))


# -- the sides -------------------------------------------------------------------------------


def ours(
    checkpoint: Path,
    frames: Sequence[Any],
    image_size: int,
    num_objects: int,
    *,
    name: str = "sam2",
    device: str = "cpu",
    dtype: str = "float32",
    num_sessions: int = 1,
    **options: Any,
) -> Step:
    """Return a steady step of the engine; a frame of each of its sessions."""
    from workers.trackers.base import TrackingConfig
    from workers.trackers.registry import create_tracking_loader

    config = TrackingConfig(
        name,
        device=device,
        checkpoint_path=str(checkpoint),
        image_size=image_size,
        dtype=dtype,
        options=options,
    )
    loader: Any = create_tracking_loader(name, config)
    loader.load()
    sessions = []
    for _ in range(num_sessions):
        session: Any = loader.open_session(*frames[0].shape[:2])
        for object_id in range(num_objects):
            session.prompt(0, object_id, box_xyxy=BOXES[object_id % len(BOXES)])
        for frame in frames[:2]:
            session.step(frame)
        session.num_steps = FIRST_STEADY
        for track in session.tracks.values():
            _age(track)
        # Undecided frames are numbered by steps.
        session._undecided.clear()
        sessions.append(session)
    turn = iter(range(10**9))

    def step() -> None:
        start = next(turn)
        if loader.num_ahead:
            for n, session in enumerate(sessions):
                ahead = range(start, start + loader.num_ahead)
                session.look_ahead([frames[(2 + n + t) % len(frames)] for t in ahead])
        loader.step_many(
            [(s, frames[(2 + n + start) % len(frames)]) for n, s in enumerate(sessions)]
        )

    return step


def _age(track: Any) -> None:
    """Let a track remember its last frame as all frames up to the steady state."""
    if not hasattr(track, "recent"):
        pathway = track.pathways[0]
        memory, newest = pathway.memory, pathway.memory.newest
        for step in range(2, FIRST_STEADY):
            memory = memory.after(replace(newest, step=step), True)
        track.lineage.plant(FIRST_STEADY - 1)
        track.pathways = [replace(pathway, memory=memory)] * len(track.pathways)
        return
    last = track.recent.entries[-1]
    for step in range(2, FIRST_STEADY):
        track.recent.add(replace(last, step=step))


def official(
    checkpoint: Path,
    frames: Sequence[Any],
    image_size: int,
    num_objects: int,
    *,
    device: str = "cpu",
    is_bfloat16: bool = False,
    is_optimized: bool = False,
) -> Step:
    """Return a steady step of Meta's video predictor."""
    import torch

    predictor = _official_predictor(checkpoint, image_size, device, is_optimized)

    def arithmetic() -> contextlib.AbstractContextManager[Any]:
        kind = torch.device(device).type
        return torch.autocast(kind, torch.bfloat16) if is_bfloat16 else contextlib.nullcontext()

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), arithmetic():
        with _quiet():
            needed = [frames[i % len(frames)] for i in range(FIRST_STEADY + 40)]
            state = _official_state(predictor, needed, folder)
        for object_id in range(num_objects):
            predictor.add_new_points_or_box(
                state, 0, object_id, box=np.array(BOXES[object_id % len(BOXES)], np.float32)
            )
        with _quiet():
            for frame_idx, *_ in predictor.propagate_in_video(state):
                if frame_idx == 1:
                    break
    for outputs in state["output_dict_per_obj"].values():
        tracked = outputs["non_cond_frame_outputs"]
        tracked |= dict.fromkeys(range(2, FIRST_STEADY), tracked[1])
    steps = predictor.propagate_in_video(state, start_frame_idx=FIRST_STEADY)

    def step() -> None:
        with torch.inference_mode(), arithmetic(), _quiet():
            _, _, logits = next(steps)
            (logits > 0).cpu()

    return step


def _official_predictor(
    checkpoint: Path, image_size: int, device: str = "cpu", is_optimized: bool = False
) -> Any:
    from sam2.build_sam import build_sam2_video_predictor

    return build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        str(checkpoint),
        device=device,
        hydra_overrides_extra=[f"++model.image_size={image_size}", "++model.fill_hole_area=0"],
        vos_optimized=is_optimized,
    )


def _official_state(predictor: Any, frames: Sequence[Any], folder: str) -> Any:
    """Return the state of a video; Meta's predictor reads it from JPEG files."""
    from PIL import Image

    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(f"{folder}/{number:05d}.jpg", quality=100, subsampling=0)
    return predictor.init_state(folder)


def transformers(
    checkpoint: Path, frames: Sequence[Any], image_size: int, num_objects: int
) -> Step:
    """Return a steady step of transformers' video session."""
    import torch
    from transformers import (
        Sam2ImageProcessor,
        Sam2VideoConfig,
        Sam2VideoModel,
        Sam2VideoProcessor,
        Sam2VideoVideoProcessor,
    )

    side = image_size // 16
    config = Sam2VideoConfig(image_size=image_size)
    config.vision_config.backbone_feature_sizes = [[side * n, side * n] for n in (4, 2, 1)]
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.prompt_encoder_config.image_size = image_size
    config.memory_attention_rope_feat_sizes = [side, side]
    model = Sam2VideoModel(config).eval()
    size = {"height": image_size, "width": image_size}
    pictures = Sam2ImageProcessor(size=size, mask_size={"height": side * 4, "width": side * 4})
    processor = Sam2VideoProcessor(
        image_processor=pictures, video_processor=Sam2VideoVideoProcessor(size=size)
    )
    session = processor.init_video_session(inference_device="cpu", dtype=torch.float32)
    height, width = frames[0].shape[:2]

    def track(frame_idx: int) -> None:
        with torch.inference_mode():
            given = pictures(frames[frame_idx % len(frames)], return_tensors="pt")
            if frame_idx == 0:
                processor.add_inputs_to_inference_session(
                    session,
                    frame_idx=0,
                    obj_ids=list(range(num_objects)),
                    input_boxes=[[BOXES[i % len(BOXES)] for i in range(num_objects)]],
                    original_size=(height, width),
                )
            seen = model(session, frame=given.pixel_values[0], frame_idx=frame_idx)
            processor.post_process_masks([seen.pred_masks], [(height, width)], binarize=True)

    track(0)
    track(1)
    for outputs in session.output_dict_per_obj.values():
        tracked = outputs["non_cond_frame_outputs"]
        tracked.update(dict.fromkeys(range(2, FIRST_STEADY), tracked[1]))
    turn = iter(range(FIRST_STEADY, 10**9))
    return lambda: track(next(turn))


def ultralytics(checkpoint: Path, frames: Sequence[Any], image_size: int, num_objects: int) -> Step:
    """Return a steady step of ultralytics' video predictor."""
    import av
    from ultralytics.models.sam import SAM2VideoPredictor

    folder = tempfile.mkdtemp(prefix="maskmill-benchmark-")
    weights, clip = Path(folder) / "sam2.1_t.pt", Path(folder) / "clip.mp4"
    weights.symlink_to(checkpoint)
    with av.open(str(clip), "w") as container:
        stream: Any = container.add_stream("h264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i in range(60):
            picture = av.VideoFrame.from_ndarray(frames[i % len(frames)], format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    predictor: Any = SAM2VideoPredictor(
        overrides={
            "imgsz": image_size,
            "model": str(weights),
            "device": "cpu",
            "conf": 0.0,
            "save": False,
            "verbose": False,
            "mode": "predict",
            "task": "segment",
        }
    )
    boxes = [BOXES[i % len(BOXES)] for i in range(num_objects)]
    results = predictor(source=str(clip), bboxes=boxes, stream=True)
    next(results)
    next(results)
    tracked = predictor.inference_state["output_dict"]["non_cond_frame_outputs"]
    newest = max(tracked)
    jump = FIRST_STEADY - 1 - newest
    for t in range(newest + 1, FIRST_STEADY):
        tracked[t] = tracked[newest]
    predictor.dataset.frame += jump
    return lambda: next(results) and None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of the official predictor."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


# -- measuring -------------------------------------------------------------------------------


def in_turns(
    sides: Mapping[str, Step], rounds: int, after: Step = lambda: None
) -> dict[str, float]:
    """Return each side's frames per second: the median of `rounds`, the sides in turn."""
    for step in sides.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            after()
            begin = time.perf_counter()
            step()
            after()
            times[name].append(time.perf_counter() - begin)
    return {name: 1 / statistics.median(of_side) for name, of_side in times.items()}


def cpu(args: argparse.Namespace, checkpoint: Path, frames: list[Any]) -> dict[str, Any]:
    """Compare on two cores."""
    import torch

    torch.set_num_threads(args.threads)
    makers: dict[str, Callable[..., Step]] = {
        "maskmill float32": ours,
        "maskmill fast_float32": lambda *a: ours(*a, fast_float32=True),
        "maskmill bfloat16": lambda *a: ours(*a, dtype="bfloat16"),
        "maskmill float32, kept keys": lambda *a: ours(*a, cache_keys=True),
        "official float32": official,
        "official bfloat16": lambda *a: official(*a, is_bfloat16=True),
        "transformers float32": transformers,
        "ultralytics float32": ultralytics,
    }
    figures: dict[str, Any] = {}
    for row in args.rows:
        image_size, num_objects = map(int, row.split("x"))
        sides = {}
        for name, make in makers.items():
            if not args.sides or any(wanted in name for wanted in args.sides):
                sides[name] = make(checkpoint, frames, image_size, num_objects)
        rates = in_turns(sides, args.rounds)
        figures[row] = rates
        print(f"\n{image_size} pixels, {num_objects} objects")
        best = max((rate for name, rate in rates.items() if "official" in name), default=None)
        base = rates.get("official float32")
        for name, rate in rates.items():
            ratio = f"{rate / base:6.2f} x official" if base else ""
            if best and name == "maskmill bfloat16":
                ratio += f", {rate / best:.2f} x its best setting"
            print(f"  {name:24} {rate:7.3f} frames/s {ratio}", flush=True)
    return figures


def long(args: argparse.Namespace, checkpoint: Path, frames: list[Any]) -> dict[str, Any]:
    """Compare SAM2Long whose pathways agree, and whose do not, with a single pathway."""
    import torch

    torch.set_num_threads(args.threads)
    size = args.image_size
    rates = in_turns(
        {
            "sam2": ours(checkpoint, frames, size, 1),
            "sam2long, certain": ours(checkpoint, frames, size, 1, name="sam2long", uncertainty=0),
        },
        max(args.rounds, 5),
    )
    ratio = rates["sam2"] / rates["sam2long, certain"]
    print(f"SAM2Long on confident footage costs {ratio:.3f} of a single pathway")
    return {**rates, "ratio": ratio}


def agreement(args: argparse.Namespace, checkpoint: Path, frames: list[Any]) -> dict[str, Any]:
    """Compare the masks of bfloat16 and of fast_float32 with those of float32.

    Weights that were never trained answer a rounding with another mask, so the official predictor's
    own bfloat16 stands beside; and with ``--davis`` and ``--image-weights`` trained ones are asked
    for the first pictures of real sequences, by the boxes of their truth.
    """
    frames = frames[: args.num_frames]
    settings: dict[str, dict[str, Any]] = {
        "float32": {},
        "fast_float32": {"options": {"fast_float32": True}},
        "bfloat16": {"dtype": "bfloat16"},
    }
    boxes = BOXES[:2]
    runs = {
        name: _our_masks(str(checkpoint), args.image_size, frames, boxes, **more)
        for name, more in settings.items()
    }
    runs["official float32"], runs["official bfloat16"] = (
        _official_masks(checkpoint, args.image_size, frames, boxes, is_bfloat16=is_bfloat16)
        for is_bfloat16 in (False, True)
    )
    figures = {}
    for name, of in (
        ("fast_float32", "float32"),
        ("bfloat16", "float32"),
        ("official bfloat16", "official float32"),
    ):
        ious = [_iou(a, b) for a, b in zip(runs[name], runs[of], strict=True)]
        figures[name] = statistics.mean(ious)
        print(f"{name}: mean IoU with {of} {figures[name]:.4f}, least {min(ious):.3f}", flush=True)
    if args.davis and args.image_weights:
        trained: dict[str, list[float]] = {"fast_float32": [], "bfloat16": []}
        for folder in sorted(path for path in args.davis.iterdir() if path.is_dir()):
            picture, box = _first_picture(folder)
            masks = {
                name: _our_masks(str(args.image_weights), None, [picture], [box], **more)[0]
                for name, more in settings.items()
            }
            for name, ious in trained.items():
                ious.append(_iou(masks[name], masks["float32"]))
        for name, ious in trained.items():
            figures[f"trained {name}"] = statistics.mean(ious)
            print(
                f"trained weights, {len(ious)} pictures, {name}: mean IoU with float32 "
                f"{statistics.mean(ious):.4f}, least {min(ious):.4f}"
            )
    return figures


def _our_masks(
    checkpoint: str, image_size: int | None, frames: list[Any], boxes: list[Any], **settings: Any
) -> list[Any]:
    """Return the masks of every frame and box; nothing where an object is occluded."""
    from workers.trackers.base import TrackingConfig
    from workers.trackers.registry import create_tracking_loader

    config = TrackingConfig(
        "sam2", device="cpu", checkpoint_path=checkpoint, image_size=image_size, **settings
    )
    loader = create_tracking_loader("sam2", config)
    loader.load()
    nothing = np.zeros(frames[0].shape[:2], bool)
    found = []
    with loader.open_session(*nothing.shape) as session:
        for object_id, box in enumerate(boxes):
            session.prompt(0, object_id, box_xyxy=box)
        for frame in frames:
            (result,) = session.step(frame)
            masks = {mask.object_id: mask.mask > 0 for mask in result.masks}
            found += [masks.get(object_id, nothing) for object_id in range(len(boxes))]
    return found


def _official_masks(
    checkpoint: Path, image_size: int, frames: list[Any], boxes: list[Any], *, is_bfloat16: bool
) -> list[Any]:
    """Return the same from Meta's video predictor."""
    import torch

    predictor = _official_predictor(checkpoint, image_size)
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16),
        _quiet(),
    ):
        state = _official_state(predictor, frames, folder)
        for object_id, box in enumerate(boxes):
            predictor.add_new_points_or_box(state, 0, object_id, box=np.array(box, np.float32))
        for _, _, logits in predictor.propagate_in_video(state):
            found += list((logits[:, 0] > 0).numpy())
    return found


def _first_picture(folder: Path) -> tuple[Any, list[int]]:
    """Return the first picture of a DAVIS sequence, and the box of its truth."""
    from PIL import Image

    truth = np.asarray(Image.open(min((folder / "masks").glob("*.png"))).convert("L")) > 0
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    picture = Image.open(min((folder / "frames").glob("*.jpg"))).convert("RGB")
    return np.asarray(picture), box


def _iou(one: Any, other: Any) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


# -- memory ----------------------------------------------------------------------------------


def memory(args: argparse.Namespace, checkpoint: Path, frames: list[Any]) -> dict[str, Any]:
    """Show peak memory against length, for pathways that agree and ones that never do."""
    sides: dict[str, dict[str, Any]] = {
        "sam2": {"name": "sam2"},
        "samurai": {"name": "samurai"},
        "sam2long, certain": {"name": "sam2long", "uncertainty": 0},
        "sam2long, never certain": {"name": "sam2long", "uncertainty": 1e9},
        "official": {},
    }
    context = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {}
    for side, settings in sides.items():
        if args.sides and not any(wanted in side for wanted in args.sides):
            continue
        for length in args.lengths:
            if side == "official" and length > 2000:
                continue  # it holds every frame
            out = context.Queue()
            child = context.Process(
                target=_peak_bytes, args=(str(checkpoint), settings, length, frames[:8], out)
            )
            child.start()
            peak, start = out.get()
            child.join()
            figures[f"{side}, {length}"] = {"peak": peak, "before": start}
            print(
                f"{side:24} {length:6} frames {peak / 2**20:8.1f} MiB at most, "
                f"{(peak - start) / 2**20:7.1f} MiB above frame 50",
                flush=True,
            )
    return figures


def _peak_bytes(
    checkpoint: str, settings: dict[str, Any], length: int, frames: list[Any], out: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    small = [np.ascontiguousarray(frame[::8, ::8]) for frame in frames]

    def resident() -> int:
        # Not the peak: while the weights are loaded more is held than ever after.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    start = most = 0
    if settings:
        from workers.trackers.base import TrackingConfig
        from workers.trackers.registry import create_tracking_loader

        name = settings.pop("name")
        config = TrackingConfig(
            name, device="cpu", checkpoint_path=checkpoint, image_size=64, options=settings
        )
        loader = create_tracking_loader(name, config)
        loader.load()
        with loader.open_session(*small[0].shape[:2]) as session:
            session.prompt(0, 1, box_xyxy=[1, 1, 40, 40])
            for i in range(length):
                session.step(small[i % len(small)])
                if i == 50:
                    start = resident()
                if i >= 50:
                    most = max(most, resident())
            session.finish()
    else:
        from PIL import Image
        from sam2.build_sam import build_sam2_video_predictor

        predictor: Any = build_sam2_video_predictor(
            "configs/sam2.1/sam2.1_hiera_t.yaml",
            checkpoint,
            device="cpu",
            hydra_overrides_extra=["++model.image_size=64", "++model.fill_hole_area=0"],
        )
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), _quiet():
            for i in range(length):
                Image.fromarray(small[i % len(small)]).save(f"{folder}/{i:05d}.jpg")
            state = predictor.init_state(folder)
            predictor.add_new_points_or_box(state, 0, 1, box=np.array([1, 1, 40, 40], np.float32))
            for frame_idx, *_ in predictor.propagate_in_video(state):
                if frame_idx == 50:
                    start = resident()
                if frame_idx >= 50:
                    most = max(most, resident())
    out.put((most, start))


# -- GPU -------------------------------------------------------------------------------------


def gpu(args: argparse.Namespace, checkpoint: Path, frames: list[Any]) -> dict[str, Any]:
    """Compare on a GPU, in bfloat16, frames of all sessions together."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return {}
    print(torch.cuda.get_device_name())
    figures: dict[str, Any] = {}
    for num_objects in (1, 10):
        num = args.sessions
        sides = {
            "maskmill": ours(
                checkpoint, frames, 1024, num_objects,
                device="cuda", dtype="bfloat16", num_sessions=num,
            ),
            "official": official(
                checkpoint, frames, 1024, num_objects, device="cuda", is_bfloat16=True
            ),
        }  # fmt: skip
        if args.optimized:
            sides["official, vos_optimized"] = official(
                checkpoint, frames, 1024, num_objects,
                device="cuda", is_bfloat16=True, is_optimized=True,
            )  # fmt: skip
        rates = in_turns(sides, max(args.rounds, 16), torch.cuda.synchronize)
        rates["maskmill"] *= num
        encoder, per_object = TINY_GFLOP
        share = rates["maskmill"] * (encoder + per_object * num_objects) * 1e9 / ROOFLINE_FLOPS
        for name, rate in rates.items():
            print(f"{num_objects:2} objects  {name:24} {rate:8.1f} frames/s", flush=True)
        print(f"           {share:.0%} of {ROOFLINE_FLOPS / 1e12:.0f} TFLOP/s")
        figures[str(num_objects)] = rates | {"roofline": share}
    return figures


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = {"cpu": cpu, "long": long, "agreement": agreement, "memory": memory, "gpu": gpu}
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="image size x objects")
    parser.add_argument("--sides", nargs="+", default=[], help="only sides whose name has one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=512, help="of long and agreement")
    parser.add_argument("--num-frames", type=int, default=12, help="of agreement")
    parser.add_argument("--davis", type=Path, help="of agreement: folder of DAVIS sequences")
    parser.add_argument("--image-weights", type=Path, help="of agreement: trained weights")
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--sessions", type=int, default=8, help="of a GPU")
    parser.add_argument("--optimized", action="store_true", help="also the compiled official one")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the official predictor: it lacks its compiled extension
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, frames = reference_data(Path(folder))
        figures = modes[args.mode](args, checkpoint, frames)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

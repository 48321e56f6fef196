"""Other libraries' networks from the plan to ONNX, each in a process of its own; resumable.

python benchmarks/sweep.py                    # measures what results/sweep.jsonl lacks
python benchmarks/sweep.py timm/resnet18      # this network, its record printed
python benchmarks/sweep.py --table            # prints a row for each
"""

import argparse
import importlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.export import export_onnx

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "sweep.jsonl"
SECONDS = 240  # for one network
Inputs = tuple[Tensor, ...]
Made = tuple[Callable[[], nn.Module], Inputs]

SIZES = {  # where 96 is not taken
    "maxvit_t": 224,
    "vit_b_32": 224,
    "inception_v3": 299,
    "raft_small": 128,
    "raft_large": 128,
}
VIDEO = {
    "mc3_18": 64,
    "r2plus1d_18": 64,
    "r3d_18": 64,
    "s3d": 224,
    "mvit_v1_b": 224,
    "swin3d_t": 64,
}
_SMALL = {
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"), 2),
    **{"num_frames": 4, "n_embd": 128, "n_positions": 256},
}


def names() -> list[str]:
    """Return all networks: a small one of every family."""
    return (ROOT / "benchmarks" / "sweep.txt").read_text().split()


def build(network: str) -> Made:
    """Return how to make a network, with random weights, and an input for it."""
    library, _, name = network.partition("/")
    return {
        "timm": _timm,
        "torchvision": _torchvision,
        "segmentation_models_pytorch": _smp,
        "diffusers": _diffusers,
        "transformers": _transformers,
    }[library](name)


def _timm(name: str) -> Made:
    import timm

    settings = timm.get_pretrained_cfg(name)
    is_fixed = settings is None or settings.fixed_input_size
    size = settings.input_size if settings is not None and is_fixed else (3, 96, 96)
    return lambda: timm.create_model(name), (torch.randn(1, *size),)


def _torchvision(name: str) -> Made:
    import torchvision.models as models

    if name in VIDEO:
        x = torch.randn(1, 3, 16 if VIDEO[name] == 224 else 4, VIDEO[name], VIDEO[name])
        return lambda: models.get_model(name, weights=None), (x,)
    size = SIZES.get(name, 96)
    x = torch.randn(1, 3, size, size)
    if name.startswith("raft"):
        return lambda: models.get_model(name, weights=None), (x, torch.randn_like(x))
    options: dict[str, Any] = {"weights": None}
    if name in (*models.list_models(models.segmentation), *models.list_models(models.detection)):
        options["weights_backbone"] = None
    if name in models.list_models(models.detection) and not name.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}
    return lambda: models.get_model(name, **options), (x,)


def _smp(name: str) -> Made:
    import segmentation_models_pytorch as smp

    kind = getattr(smp, name)
    return lambda: kind("resnet18", encoder_weights=None), (torch.randn(1, 3, 128, 128),)


def _diffusers(name: str) -> Made:
    import diffusers

    kind, time_step = getattr(diffusers, name), torch.tensor([7])
    image, latent = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 16, 16)
    text = torch.randn(1, 5, 64)
    narrow: dict[str, Any] = {"block_out_channels": (64, 128), "layers_per_block": 1}
    two = lambda block: (block,) * 2  # noqa: E731
    vae = {
        **narrow,
        "down_block_types": two("DownEncoderBlock2D"),
        "up_block_types": two("UpDecoderBlock2D"),
    }
    options: dict[str, tuple[dict[str, Any], Inputs]] = {
        "UNet1DModel": (
            {"extra_in_channels": 64},
            (torch.randn(1, 2, 256), time_step),
        ),
        "UNet2DModel": (
            {
                **narrow,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
            (image, time_step),
        ),
        "UNet2DConditionModel": (
            {
                **narrow,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 64,
            },
            (latent, time_step, text),
        ),
        "UNet3DConditionModel": (
            {
                **narrow,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "cross_attention_dim": 64,
            },
            (latent[:, :, None].repeat(1, 1, 2, 1, 1), time_step, text),
        ),
        "AutoencoderKL": (vae, (image,)),
        "AutoencoderTiny": ({}, (image,)),
        "AsymmetricAutoencoderKL": (
            {
                "down_block_types": two("DownEncoderBlock2D"),
                "down_block_out_channels": (64, 128),
                "up_block_types": two("UpDecoderBlock2D"),
                "up_block_out_channels": (64, 128),
            },
            (image,),
        ),
        "VQModel": (vae, (image,)),
        "AutoencoderDC": (
            {
                "encoder_block_out_channels": (64, 128),
                "decoder_block_out_channels": (64, 128),
                "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
                "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
                "encoder_layers_per_block": (1, 1),
                "decoder_layers_per_block": (1, 1),
                "encoder_qkv_multiscales": ((), (5,)),
                "decoder_qkv_multiscales": ((), (5,)),
            },
            (image,),
        ),
        "AutoencoderOobleck": (
            {
                "encoder_hidden_size": 32,
                "decoder_channels": 32,
                "decoder_input_channels": 16,
                "channel_multiples": [1, 2, 4],
                "downsampling_ratios": [2, 4, 4],
            },
            (torch.randn(1, 2, 2048),),
        ),
        "AutoencoderKLTemporalDecoder": (
            {**narrow, "down_block_types": two("DownEncoderBlock2D")},
            (image,),
        ),
        "AutoencoderKLCogVideoX": (
            {
                "block_out_channels": (32, 64),
                "down_block_types": two("CogVideoXDownBlock3D"),
                "up_block_types": two("CogVideoXUpBlock3D"),
                "layers_per_block": 1,
                "norm_num_groups": 8,
            },
            (image[:, :, None],),
        ),
    }
    arguments, inputs = options[name]
    return lambda: kind(**arguments), inputs


def _transformers(name: str) -> Made:
    import transformers

    kind = getattr(transformers, name)
    default = kind.config_class()
    small = {key: value for key, value in _SMALL.items() if key in default.to_dict()}
    if hasattr(default, "use_pretrained_backbone"):
        small["use_pretrained_backbone"] = False
    if name.startswith("DPT"):  # takes hidden states of four layers
        small |= {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    side = getattr(default, "image_size", None) or (320 if name.startswith("RTDetr") else 96)
    side = side if isinstance(side, int) else side[0]
    x = torch.randn(1, 3, side, side)
    if "Video" in name:
        x = torch.randn(1, getattr(kind.config_class(**small), "num_frames", 4), 3, side, side)
    if name.startswith("ImageGPT"):
        x = torch.randint(0, 512, (1, 64))
    return lambda: kind(kind.config_class(**small)), (x,)


def measure(network: str, *, is_exported: bool = True) -> dict[str, Any]:
    """Take a network from the plan to the loaded artefact and, if asked, to ONNX."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factory, inputs = build(network)
    model = factory().eval()
    every_layer = dt.Layers(skip_first_conv=False, linear=True)
    planned = dt.plan(model, dt.SVD(), ratio=3, example_input=inputs, layers=every_layer)
    record: dict[str, Any] = {"network": network, "parameters": planned.dense_parameters}
    weights = sum(layer.weight_numel for layer in planned.layers)
    kept: dict[str, float] = {}
    for layer in planned.kept:
        reason = layer.reason.partition(":")[0]
        kept[reason] = kept.get(reason, 0.0) + layer.weight_numel / weights
    record |= {
        "small_parameters": planned.parameters,
        "compressed_share": sum(layer.weight_numel for layer in planned.compressed) / weights,
        "layer_mac_ratio": planned.dense_macs / max(1, planned.macs),
        "network_mac_ratio": planned.network_speedup(),
        "kept": kept,
    }
    twist = dt.DeepTwist(model, planned, interval=1, example_input=inputs)
    twist.step()
    small = twist.finish().eval()
    stored = sum(p.numel() for p in small.parameters())
    record |= {"output_difference": twist.output_difference, "stored": stored}
    with tempfile.TemporaryDirectory() as folder:
        loaded = dt.load(dt.save(small, Path(folder, "small")), factory).eval()
        states = small.state_dict(), loaded.state_dict()
        record["loads_equal"] = states[0].keys() == states[1].keys() and all(
            torch.equal(value, states[1][name]) for name, value in states[0].items()
        )
        record["seconds"] = time.perf_counter() - start
        if is_exported:
            record["onnx"] = _export(small, Path(folder, "small.onnx"), inputs)
    record["onnx_seconds"] = time.perf_counter() - start - record["seconds"]
    return record


def _export(small: nn.Module, path: Path, inputs: Inputs) -> str:
    """Return how the network left as ONNX, or why it did not."""
    try:
        export_onnx(small, path, inputs)
    except dt.DeepTwistError as error:
        return str(error)
    return "free batch"


def in_a_process(network: str, *, is_exported: bool = True) -> dict[str, Any]:
    """Measure a network in a process of its own; return its record, or one of the failure."""
    context = multiprocessing.get_context("fork")  # what is imported here is there at once
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(network, is_exported, its))
    process.start()
    its.close()
    try:
        if ours.poll(SECONDS):
            record: dict[str, Any] = ours.recv()
            return record
        return {"network": network, "failure": f"takes more than {SECONDS} s"}
    except EOFError:
        process.join()
        return {"network": network, "failure": f"ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(network: str, is_exported: bool, connection: Any) -> None:
    try:
        record = measure(network, is_exported=is_exported)
    except Exception as error:  # a failure is a result
        message = " ".join(str(error).split())[:300]
        record = {"network": network, "failure": f"{type(error).__name__}: {message}"}
    connection.send(record)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by network, the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["network"]: record for record in map(json.loads, lines)}


def sweep(path: Path) -> None:
    """Measure every network that the file lacks."""
    done = read(path)
    for network in names():
        if network in done:
            continue
        record = in_a_process(network)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(network, record.get("failure") or f"{record['compressed_share']:.1%}", flush=True)


def table(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what they come to together, and the lines of a table."""
    good = [r for r in records.values() if "failure" not in r]
    shares = [r["compressed_share"] for r in good]
    ratios = [r["network_mac_ratio"] for r in good if r["network_mac_ratio"]]
    yield (
        f"{len(records)} networks, {len(good)} from the plan to the loaded folder; median "
        f"compressed share {statistics.median(shares):.1%}, median of the whole network's MACs "
        f"{statistics.median(ratios):.2f}× fewer; {sum(s < 0.5 for s in shares)} below 50 %; "
        f"largest difference of outputs {max(r['output_difference'] for r in good):.1e}; "
        f"{sum(r['loads_equal'] for r in good)} load bit for bit; "
        f"{sum(r['onnx'] == 'free batch' for r in good)} of the "
        f"{sum(r['onnx'] != 'untried' for r in good)} that were exported leave as ONNX with a free "
        "batch."
    )
    yield ""
    yield "| network | parameters | compressed share | MACs, whole network | kept, and why |"
    yield "| --- | ---: | ---: | ---: | --- |"
    for network in sorted(records):
        r = records[network]
        if "failure" in r:
            yield f"| {network} | | | | {r['failure']} |"
            continue
        reasons = sorted(r["kept"].items(), key=lambda item: -item[1])
        kept = "; ".join(f"{share:.1%} {reason}" for reason, share in reasons if share > 5e-4)
        ratio = f"{r['network_mac_ratio']:.2f}×" if r["network_mac_ratio"] else ""
        yield (
            f"| {network} | {r['parameters'] / 1e6:.1f} → {r['small_parameters'] / 1e6:.1f} M "
            f"| {r['compressed_share']:.1%} | {ratio} | {kept} |"
        )


def main() -> None:
    """Run the sweep, measure networks by name, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--exported", type=int, help="so many leave as ONNX, from the first on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        print(*table(read(arguments.out)), sep="\n")
    for library in {network.partition("/")[0] for network in arguments.networks}:
        importlib.import_module(library)  # once for all the processes that are forked
    for index, network in enumerate(arguments.networks):
        is_exported = arguments.exported is None or index < arguments.exported
        print(json.dumps(in_a_process(network, is_exported=is_exported)), flush=True)
    if not arguments.table and not arguments.networks:
        sweep(arguments.out)


if __name__ == "__main__":
    main()

"""`lory merge` and `lory convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lory.cli.options import Dtype, Json, Model, SumMode, TrustRemoteCode, print_json, progress_bar


def merge(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", metavar="OUT")],
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the merged weights; by default the base's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, as in 5GB or 500MB.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where the products are computed.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model, and check that the result answers alike."""
    import torch

    from lory import export
    from lory.adapters.merge import parse_size

    shard_bytes = parse_size(max_shard_size)
    with progress_bar("Merging") as progress:
        precision = getattr(torch, dtype.value) if dtype else None
        merged = export.merge(model, out, precision, shard_bytes, device, progress, trust_remote_code)
    if as_json:
        print_json(merged.to_dict())
    else:
        report = merged.report
        print(
            f"{out}: {report.merged} of {report.tensors} tensors merged, {report.bytes / 1e9:.2f} GB in "
            f"{report.shards} file{'s' if report.shards > 1 else ''}; logits differ from base and adapter by at most "
            f"{merged.difference:.1e} of the largest."
        )


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A loralib file, a training checkpoint, or adapters to add up, FOLDER=WEIGHT.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, or a .pt or .safetensors file for loralib.")],
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha that the layers were built with.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base MODEL: for an adapter's config, or to take one from.")
    ] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW for names, OLD a regular expression.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Regular expression of tensors to leave out.")] = None,
    merged: Annotated[
        list[str] | None, typer.Option(help="loralib's MergedLinear layers, as in c_attn=1,0,1 or qkv=64:1,16:0,16:1.")
    ] = None,
    conv: Annotated[list[str] | None, typer.Option(help="loralib's convolutions and kernels, as in conv1=3x3.")] = None,
    embedding: Annotated[str | None, typer.Option(help="Regular expression of loralib's embeddings.")] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="The model's layers store (in, out), as GPT-2's do.")
    ] = False,
    save_module: Annotated[list[str] | None, typer.Option(help="Module that was trained whole.")] = None,
    adapter_name: Annotated[str | None, typer.Option(help="Which of several adapters in a checkpoint.")] = None,
    mode: Annotated[SumMode | None, typer.Option(help="How adapters are added up: exactly, or roughly.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Give all layers the same rank and alpha.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Store a model's weights as fp32.")] = False,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file of a model, as in 5GB.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Convert adapters between loralib and PEFT, add them up, and turn training checkpoints into folders."""
    from lory.adapters import convert as adapters
    from lory.adapters.merge import parse_size
    from lory.models.resolve import resolve

    options = adapters.Options(
        alpha=alpha,
        base=base,
        rename=tuple(rename or ()),
        ignore=tuple(ignore or ()),
        merged=tuple(merged or ()),
        conv=tuple(conv or ()),
        embedding=embedding,
        fan_in_fan_out=fan_in_fan_out,
        save_module=tuple(save_module or ()),
        adapter_name=adapter_name,
        mode=mode.value if mode else None,
        even=even,
        fp32=fp32,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=parse_size(max_shard_size) if max_shard_size else None,
    )
    with progress_bar("Converting") as progress:
        done = adapters.convert(sources, out, options, lambda name: resolve(name).base_path, progress)
    if as_json:
        print_json(done.to_dict())
        return
    what = (
        f"{done.layers} layers, ranks {', '.join(map(str, done.ranks))}, alpha {done.alpha:g}"
        if done.layers
        else (f"{done.files} file{'s' if done.files > 1 else ''} of weights")
    )
    print(f"{out}: {what} ({done.way}).")
    if done.left_out:
        print(f"Left out: {', '.join(done.left_out[:10])}{' ...' if len(done.left_out) > 10 else ''}")
    for note in done.notes:
        print(f"note: {note}")

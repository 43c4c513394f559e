"""`fcache convert`: a checkpoint made into a weights file."""

from pathlib import Path

import click

SHOWN = 8


@click.command(
    epilog="""\b
Examples:
  fcache convert simmim_base.pth swin-b.safetensors --model swin_base_patch4_window7_224
  fcache convert mp_rank_00_model_states.pt giant.safetensors --model swinv2-g:depths=2-2-42-2
  fcache convert checkpoint.pth weights.safetensors           only unpack, check nothing against a model

\b
Formats: timm, Swin and SwinV2, SimMIM, EsViT, MoCo v3, MAE, BEiT, DeiT, DeepSpeed.
Tensors keep their type. No code in a checkpoint is run.
Exit status: 1 if the checkpoint cannot be read or does not fit the model, 2 if the target exists, 6 without space.
"""
)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST.safetensors", type=click.Path(path_type=Path))
@click.option("--model", help="Check that it fits this model, all of it, and take the model's names.", metavar="NAME")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def command(source: Path, target: Path, model: str | None, force: bool) -> None:
    """Make a weights file of a checkpoint: the encoder's tensors alone, in a form that loads fast."""
    from fcache.cli.progress import size
    from fcache.extractor.backbones import convert_weights

    found = convert_weights(source, target, model=model, overwrite=force)
    click.echo(f"{target}: {found.tensors} tensors, {size(found.bytes)}, weights {found.sha256[:16]}")
    if found.left_out:
        more = ", …" if len(found.left_out) > SHOWN else ""
        click.echo(f"left out: {', '.join(found.left_out[:SHOWN])}{more}")

"""Detectors learn a few fixed pictures by heart."""

import pytest

from fcache.heads import TrainConfig, choose_head, train

NARROW = "width=32,box_units=64,proposals=30,rois=32,anchor_scales=4,mask_convs=1"


@pytest.mark.parametrize(
    ("form", "iterations", "pictures"),
    [
        (f"maskrcnn:{NARROW}", 300, {}),
        (f"cascade:{NARROW}", 240, {}),
        (f"htc:{NARROW}", 200, {"grid": 1, "seed": 3, "semantic": True}),
        (f"htc-without-semantic:{NARROW}", 160, {"grid": 1, "seed": 3}),
    ],
    ids=["maskrcnn", "cascade", "htc", "htc-without-semantic"],
)
def test_pictures_are_learnt_by_heart(form, iterations, pictures, objects, tmp_path):
    source = objects(2, batch_size=2, **pictures)
    held = objects(2, role="evaluation", **pictures)
    config = TrainConfig(
        iterations=iterations,
        batch_size=2,
        lr=4e-3,
        schedule="cosine",
        warmup=10,
        clip=1.0,
        weight_decay=0.0,
        checkpoint_every=0,
    )
    (run,) = train(source, [choose_head(form, source.info, config)], config, out=tmp_path, validation=held)
    assert run.metrics["box_ap"] > 0.95
    assert run.metrics["mask_ap"] > 0.95

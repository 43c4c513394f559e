"""The fingerprint of a machine."""

import json

import torch

from fcache.extractor.backbones import fingerprint


def test_a_fingerprint_is_json_data_that_names_versions_device_and_numerics() -> None:
    found = fingerprint("cpu", precision="fp32")
    assert json.loads(json.dumps(found)) == found
    assert set(found["versions"]) == {"torch", "timm", "torchvision", "Pillow", "numpy"}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"]["type"] == "cpu"
    assert found["device"]["model"]
    assert found["threads"] == 1
    assert found["autocast"] == "off"
    assert found["tf32"] is False
    assert fingerprint("cpu")["autocast"] == "bfloat16"
    assert found["attention"]["swinv2"] == {"revision": 1, "stepwise_tokens": 256, "products": "own"}
    assert fingerprint("cpu")["attention"] != found["attention"]
    assert fingerprint("cpu") == fingerprint(torch.device("cpu"))


def test_another_number_of_threads_is_another_fingerprint() -> None:
    before = fingerprint("cpu")
    torch.set_num_threads(2)
    try:
        assert fingerprint("cpu") != before
    finally:
        torch.set_num_threads(1)

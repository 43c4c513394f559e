"""The benchmarks of extraction name the limit, and the simulated processes end when known answers say so."""

import argparse

import pytest


def test_an_extraction_is_compared_with_the_slowest_of_its_parts(tmp_path):
    import extraction

    args = argparse.Namespace(records=4, size=64, device="cpu", workers=0)
    row = extraction.measure(extraction.make_job(tmp_path, "mobilenetv2_050", args), rounds=1)
    parts = {name: row[name] for name in ("backbone", "decoding", "writing")}
    assert row["limit"] == min(parts, key=parts.get)
    slowest = max(row["seconds"][name][0] for name in parts)
    assert row["ratio"] == row["low"] == row["high"] == pytest.approx(slowest / row["seconds"]["extraction"][0])
    assert 0 < row["cpu"] < 1.2
    assert 0 <= row["others"] <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]


@pytest.fixture
def service():
    from scaling import Service

    return Service(compute=1.0, spread=0.0, write=0.0, claim=0.0, vain=0.0, look=0.0)


def test_devices_without_other_costs_are_used_in_full(service):
    import scaling

    for devices in (1, 8, 64):
        assert scaling.simulate(devices, 640, service)["share"] == pytest.approx(1, abs=1e-3)


def test_the_last_shard_leaves_devices_idle(service):
    import scaling

    # 9 shards on 8 devices take two turns.
    found = scaling.simulate(8, 9, service)
    assert found["share"] == pytest.approx(9 / 16, abs=1e-3)
    assert found["idle"] == pytest.approx(7 / 16, abs=1e-3)


def test_a_disk_that_takes_one_shard_at_a_time_limits_many_devices(service):
    from dataclasses import replace

    import scaling

    # It writes ten shards a second, 64 devices make 64.
    found = scaling.simulate(64, 1280, replace(service, write=0.1))
    assert found["share"] == pytest.approx(10 / 64, abs=0.02)
    assert found["disk"] > 0.7
    assert scaling.simulate(8, 800, replace(service, write=0.1))["share"] > 0.98


def test_a_question_for_every_shard_of_others_costs_what_a_look_saves(service):
    from dataclasses import replace

    import scaling

    slow = replace(service, vain=0.01, look=0.01)
    # Of 64 devices each asks in vain for the 63 shards of the others, before each of its own.
    asked = scaling.simulate(64, 1280, slow, looks=False)
    assert asked["claiming"] == pytest.approx(0.63 / 1.63, abs=0.05)
    assert scaling.simulate(64, 1280, slow)["claiming"] < 0.03

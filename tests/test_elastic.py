"""studies/elastic.py: two groups do what train.py --local_steps does; one that is killed and started again joins."""

import os
import re
import socket
import threading

import pytest
import torch

import storage
from cli import UserError
from commands import ROOT, assert_one_line, finish_well, start

os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported
torchft = pytest.importorskip("torchft", reason="torchft is not installed (Linux on x86-64 only)")
from torchft._torchft import LighthouseServer

from studies.elastic import claim_new

FLAGS = ["--local_steps=10", "--warmup_steps=5", "--lr=1e-3", "--dropout=0", "--time_sampling=exact_k"]


@pytest.fixture
def lighthouse(request):
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        socket.socket(socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"torchft needs a host name that resolves, and IPv6: {error}")
    server = LighthouseServer(bind="[::]:0", min_replicas=request.param, heartbeat_timeout_ms=1000)
    yield server.address()
    server.shutdown()


def group(k, data_dir, out, lighthouse, *flags):
    return start("mdlm_text8", data_dir, out, *FLAGS, *flags, script=ROOT / "studies/elastic.py", REPLICA_GROUP_ID=k,
                 NUM_REPLICA_GROUPS=2, TORCHFT_LIGHTHOUSE=lighthouse, RUST_LOG="error")[0]


@pytest.mark.parametrize("lighthouse", [2], indirect=True)  # the first exchange waits for two groups
def test_agrees_with_local_sgd(data_dir, tmp_path, lighthouse):
    """Weights and averages of the two groups are equal to the bit, and those of train.py up to rounding."""
    groups = [group(k, data_dir, tmp_path, lighthouse, "--max_steps=40") for k in (0, 1)]
    finish_well(groups)
    finish_well(start("mdlm_text8", data_dir, tmp_path / "train", *FLAGS, "--max_steps=40", n=2))
    one, other, ours = (storage.read(tmp_path / name) for name in ("0", "1", "train"))
    for kind in ("model", "ema"):
        assert storage.digest(one[kind]) == storage.digest(other[kind])
        for name, w in ours[kind].items():
            torch.testing.assert_close(one[kind][name], w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lighthouse", [1], indirect=True)
def test_a_group_dies_and_comes_back(data_dir, tmp_path, lighthouse):
    """The other goes on alone; the new one gets its state, and they agree again from then on."""
    def rounds(process, n=1, groups=2):
        """Read lines up to n rounds with this number of groups. Returns {round: (bits per token, checksum)}."""
        found = {}
        while len(found) < n:
            line = process.stdout.readline()
            assert line, "the process ended"
            match = re.match(r"round (\d+)  groups (\d+)  bits (\S+)  checksum (\S+)$", line)
            if match and int(match[2]) == groups:
                found[int(match[1])] = float(match[3]), match[4]
        return found

    go = lambda k: group(k, data_dir, tmp_path, lighthouse, "--max_steps=10000000")
    processes = [go(0), go(1)]
    watchdog = threading.Timer(150, lambda: [process.kill() for process in processes])
    watchdog.start()
    try:
        first = rounds(processes[0], 3)
        processes[1].kill()
        rounds(processes[0], groups=1)
        processes.append(go(1))
        theirs, mine = rounds(processes[2], 5), rounds(processes[0], 8)
        common = theirs.keys() & mine.keys()
        assert len(common) >= 3 and all(theirs[r][1] == mine[r][1] for r in common)
        assert theirs[min(theirs)][0] < min(bits for bits, _ in first.values()) - 0.1  # it has what the other learnt
    finally:
        watchdog.cancel()
        for process in processes:
            process.kill()
            process.wait()


def test_what_is_missing(call, monkeypatch):
    go = lambda *flags: call("studies/elastic.py", "demo", *flags)
    for name in ("TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"):
        monkeypatch.delenv(name, raising=False)
        assert_one_line(go("--local_steps=5"), f"{name} is not set")
        monkeypatch.setenv(name, "2")
    assert_one_line(go(), "--local_steps is missing")
    assert_one_line(go("--local_steps=5", "--fragments=2"), "fragments", "leave them out")
    assert_one_line(go("--local_steps=7"), "max_steps=1700 must be a multiple of local_steps=7")
    assert_one_line(go("--local_steps=5"), "REPLICA_GROUP_ID must be one of 0 ...")


def test_no_run_is_written_over(tmp_path):
    assert claim_new(tmp_path / "new") and (tmp_path / "new").is_dir()
    (tmp_path / "ckpt_best.pt").write_text("precious")
    with pytest.raises(UserError, match="has a run already"):
        claim_new(tmp_path)

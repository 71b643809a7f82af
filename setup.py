"""Drives CMake; everything else stands in pyproject.toml.

Environment variables of the build:
    VGGT_MV_NO_EXT=1      no compiled kernels: a pure-Python package on the reference backend
    VGGT_MV_CUDA          1: CUDA kernels or an error; 0: CPU kernels only; auto (default): CUDA where nvcc is found
    VGGT_MV_CUDA_ARCHS    GPU targets, such as "80;90a" (default: the GPU that is present, else 80;90a)
    VGGT_MV_WERROR=1      compiler warnings are errors
nvcc is looked for in CUDACXX, on the PATH, and in the bin folder of CUDA_HOME and CUDA_PATH.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "vggt_mv_ext"


def switch(name: str, allowed: tuple[str, ...], default: str) -> str:
    """Reads an environment variable that takes one of a few values."""
    value = os.environ.get(name, "").strip() or default
    if value not in allowed:
        raise SystemExit(f"environment variable {name}: must be one of {', '.join(allowed)}; got {value!r}")
    return value


NO_EXT = switch("VGGT_MV_NO_EXT", ("0", "1"), "0") == "1"


def pybind11_include() -> str:
    """The folder with pybind11's headers: of pybind11 itself, else the copy that every PyTorch brings along."""
    pybind11 = importlib.util.find_spec("pybind11")
    torch = importlib.util.find_spec("torch")  # located, never imported
    for spec, folder in ((pybind11, "include"), (torch, "include")):
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / folder
            if (include / "pybind11" / "pybind11.h").exists():
                return str(include)
    raise SystemExit("no pybind11 headers found: install pybind11, or build with isolation (pip install .)")


def find_nvcc() -> str | None:
    """The CUDA compiler, or None; in the order that the module's docstring gives."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    folders = [str(Path(os.environ[name]) / "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders) if folders else "")


def find_program(name: str) -> str:
    """The path of a program that the build cannot do without."""
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"building the kernels needs {name}: install it, or set VGGT_MV_NO_EXT=1 for pure Python")
    return found


def check_compiler() -> None:
    """Says what to do where there is no C++ compiler, before CMake says it in fifty lines."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise SystemExit(
            "building the kernels needs a C++20 compiler (g++ 11, clang 14 or later): install one or point CXX to it, "
            "or set VGGT_MV_NO_EXT=1 for a pure-Python package on the reference backend"
        )


def write_record(folder: Path, record: dict[str, str]) -> None:
    """What vggt_mv_ext reads when it is imported: what this build is, and why something is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class CMakeBuild(build_ext):
    """Configures and builds with CMake and ninja, in a folder that later builds reuse."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the one extension and records how."""
        check_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = self.build_folder()
        cuda = switch("VGGT_MV_CUDA", ("auto", "0", "1"), "auto")
        nvcc = find_nvcc() if cuda != "0" else None
        arguments = [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVGGT_MV_PYBIND11_INCLUDE={pybind11_include()}",
            f"-DVGGT_MV_CUDA={cuda if nvcc or cuda == '1' else '0'}",
            f"-DVGGT_MV_CUDA_ARCHS={os.environ.get('VGGT_MV_CUDA_ARCHS', '')}",
            f"-DVGGT_MV_WERROR={switch('VGGT_MV_WERROR', ('0', '1'), '0')}",
        ]
        if nvcc:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        cmake = find_program("cmake")
        self.announce(f"building {ext.name} in {folder}", level=2)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *arguments], check=True)
        subprocess.run([cmake, "--build", str(folder)], check=True)
        subprocess.run([cmake, "--install", str(folder), "--prefix", str(target.parent)], check=True)
        self.record = {"kind": "full"}
        if cuda == "0":
            self.record["reason"] = "no CUDA kernels: VGGT_MV_CUDA=0 was set"
        elif not nvcc:
            self.record["reason"] = "no CUDA kernels: no nvcc on the PATH, in CUDACXX, CUDA_HOME or CUDA_PATH"
        write_record(target, self.record)

    def copy_extensions_to_source(self) -> None:
        """Brings module and record into the source tree, for editable installs and `build_ext --inplace`."""
        super().copy_extensions_to_source()
        if self.extensions:
            write_record(ROOT / PACKAGE, self.record)

    def build_folder(self) -> Path:
        """One folder for each interpreter and choice; emptied when another cmake comes along (isolated builds)."""
        cuda = switch("VGGT_MV_CUDA", ("auto", "0", "1"), "auto")
        tag = f"{sys.implementation.cache_tag}-cuda-{cuda}" + ("-debug" if self.debug else "")
        folder = ROOT / "build" / f"cmake-{tag}"
        stamp = folder / "made-by.txt"
        text = "\n".join(
            [str(ROOT), find_program("cmake"), sys.executable, str(find_nvcc()), os.environ.get("CXX", "")]
        )
        if folder.exists() and (not stamp.exists() or stamp.read_text(encoding="utf-8") != text):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(text, encoding="utf-8")
        return folder


class RecordedBuildPy(build_py):
    """Records a build without kernels, where no build_ext runs that would."""

    def run(self) -> None:
        """Copies the package, then writes the record."""
        super().run()
        if NO_EXT:
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
            write_record(folder, {"kind": "no_ext", "reason": "VGGT_MV_NO_EXT=1 was set when it was built"})


setup(
    packages=find_namespace_packages("python", include=["vggt_mv*"])
    + find_namespace_packages(".", include=["vggt_mv_ext*"]),
    package_dir={"": "python", PACKAGE: PACKAGE},
    package_data={"vggt_mv": ["py.typed", "**/*.json"], PACKAGE: ["py.typed"]},
    ext_modules=[] if NO_EXT else [Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": RecordedBuildPy},
)

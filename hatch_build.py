"""Build hook for the layout of the wheel: each module becomes a package, because type checkers look for py.typed only
in packages, and the programs go into pqueue_tools, so that every name in site-packages begins with pqueue."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = ("admin.py", "consumer.py", "manager.py", "ops.py", "producer.py")
DATA = ("supervisord.conf", ".streamlit/config.toml")


class Layout(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            raise ValueError("expected an installation of a copy, got an editable one: run the checkout as it is")
        self.markers = TemporaryDirectory()  # a file can be installed only once
        for module in sorted(path.stem for path in Path(self.root).glob("pqueue*.py")):
            marker = Path(self.markers.name, module)
            marker.touch()
            build_data["force_include"][str(marker)] = f"{module}/py.typed"
            build_data["force_include"][f"{module}.py"] = f"{module}/__init__.py"
        for name in PROGRAMS + DATA:
            build_data["force_include"][name] = f"pqueue_tools/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.markers.cleanup()

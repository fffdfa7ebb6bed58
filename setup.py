"""What pyproject.toml cannot say: the configs, which lie on top of a clone, go into the package of a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies ``configs/*.yaml`` to ``lightning_qk/configs``. An editable install reads them where they are."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for source, target in self._configs():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files that were built, the configs among them."""
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._configs())]

    def _configs(self) -> list[tuple[str, str]]:
        target = Path(self.build_lib, "lightning_qk", "configs")
        return [(str(path), str(target / path.name)) for path in sorted(Path("configs").glob("*.yaml"))]


setup(cmdclass={"build_py": BuildWithConfigs})

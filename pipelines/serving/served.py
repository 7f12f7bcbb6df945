"""Decides which version of an index is served, with which model: the latest index whose codes the model of the moment makes."""

from dataclasses import dataclass

from data.filesystem import to_path
from pipelines.registry.encoders import Resolved, check_encodes, resolve
from pipelines.retrieval.sharded_index import Record, read_manifest
from pipelines.serving.shards import Place


@dataclass(frozen=True)
class Served:
    """A version of an index, and the model that encodes its queries."""

    manifest: Record
    model: Resolved
    places: list[Place]

    @property
    def count(self) -> int:
        """Codes of the index."""
        return sum(shard["count"] for shard in self.manifest["shards"])

    @property
    def label(self) -> str:
        """The version in words."""
        return f"version {self.manifest['version']} of the index, model {self.model.name}"


class Choice:
    """Chooses again when the index or the alias has changed.

    Attributes:
        refused: why the latest index or champion is not served; "" if it is.
        unreachable: why the registry's alias could not be followed when it was last tried; "" if it could.
    """

    def __init__(self, folder: str, model: str, storage: str, tracking: str) -> None:
        """Args:
        folder: of the index.
        model: as ``open_encoder`` takes it; "" for the one that the index names.
        """
        self.folder, self.model, self.storage, self.tracking = to_path(folder), model, storage, tracking
        self.refused, self.unreachable = "", ""
        self.known: dict[str, Resolved] = {}
        self.fitting: set[tuple[Resolved, str]] = set()

    def latest(self, now: Served | None) -> Served:
        """What is to be served instead of what is served ``now``, which is kept if nothing else can be.

        Raises:
            ValueError: nothing is served, and nothing can be.
        """
        try:
            manifest = read_manifest(self.folder)
            model = self._resolved(self.model or manifest["model"], now)
            if now and manifest == now.manifest and model == now.model:
                self.refused = ""
                return now
            if (model, manifest["model"]) not in self.fitting:
                check_encodes(model, manifest["model"], self.storage, self.tracking)
                self.fitting.add((model, manifest["model"]))
        except (ValueError, OSError) as error:
            if now is None:
                raise ValueError(str(error)) from error
            self.refused = (str(error).splitlines() or [type(error).__name__])[0]
            return now
        self.refused = ""
        bare = manifest | {"shards": []}
        return Served(manifest, model, [Place(str(self.folder), bare, each) for each in manifest["shards"]])

    def _resolved(self, model: str, now: Served | None) -> Resolved:
        """A model's version. A version and a run stay what they are; of an alias that cannot be looked up, the version that is served is kept."""
        if model in self.known:
            return self.known[model]
        try:
            found = resolve(model, self.storage, self.tracking)
        except (ValueError, OSError) as error:
            self.unreachable = (str(error).splitlines() or [type(error).__name__])[0]
            if now is None:
                raise
            return now.model
        self.unreachable = ""
        if not (model.startswith("models:/") and "@" in model):
            self.known[model] = found
        return found

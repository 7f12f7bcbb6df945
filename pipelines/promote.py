"""Stage: make the challenger the champion, if it is the better on the same data and protocol."""

from dataclasses import dataclass
from typing import Any

from pipelines.config import option, positional

SAME = ("dataset_digest", "protocol", "source", "target")


@dataclass
class Config:
    """Options of ``hashbridge promote``."""

    name: str = positional("name of the registered model")
    metric: str = option("target/map", "metric that decides, as `train` prints it; the higher is the better")
    storage: str = option("runs", "folder of runs")
    tracking: str = option("", "MLflow's tracking URI (default: MLFLOW_TRACKING_URI, else SQLite in the storage)")


def run(config: Config) -> dict[str, Any]:
    """Promote; returns the decision.

    Raises:
        ValueError: there is no challenger, or it was measured on other data or protocol than the champion.
    """
    from pipelines import tracking  # noqa: PLC0415  mlflow is slow to import

    uri = config.tracking or tracking.default_uri(config.storage)
    challenger = tracking.version_tags(uri, config.name, "challenger")
    if challenger is None:
        raise ValueError(f"model {config.name!r} has no challenger: `hashbridge register RUN --name {config.name}` makes one")
    champion = tracking.version_tags(uri, config.name, "champion")
    key = f"metric.{config.metric.replace('/', '.')}"
    figures = [float(each[1][key]) if each and key in each[1] else None for each in (challenger, champion)]
    if champion and None in figures:
        raise ValueError(f"metric {config.metric!r} was not measured for both versions: take one of their `metric.` tags")
    if champion:
        for tag in SAME:
            if challenger[1].get(tag) != champion[1].get(tag):
                raise ValueError(
                    f"version {challenger[0]} has {tag} {challenger[1].get(tag)}, champion {champion[0]} has {champion[1].get(tag)}: "
                    "only versions measured on the same data and protocol are compared"
                )
    better = champion is None or (figures[0] or 0.0) > (figures[1] or 0.0)
    moved = better and (champion is None or champion[0] != challenger[0])
    if moved:
        tracking.set_alias(uri, config.name, "champion", challenger[0])
    shown = ["not measured" if figure is None else f"{figure:.4f}" for figure in figures]
    against = f"champion {champion[0]} {config.metric} {shown[1]}" if champion else "no champion yet"
    verdict = "is the champion now" if moved else "is the champion already" if champion and champion[0] == challenger[0] else "is not better"
    print(f"{config.name}: challenger {challenger[0]} {config.metric} {shown[0]}, {against}: version {challenger[0]} {verdict}")
    return {"name": config.name, "challenger": challenger[0], "champion": champion and champion[0], "promoted": moved}

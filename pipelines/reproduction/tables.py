"""The papers' tables: rows, the method and setting that each row is here, and the papers' figures.

Figures are in percent. A column is ``source -> target`` as here: the target's images are the queries, also where a paper (UCDIR) names the query first.
Columns that the papers average are ``mean``.
"""

import itertools
from typing import Any, NamedTuple

from models.registry import find_method

ACCURACY, CROSS, TARGET = "accuracy", "cross/map", "target/map"
NEAREST = ""  # in place of a method: the dataset's features by cosine, which nothing trains


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: as the paper writes it, or ours for a row that the paper has not.
        method: of the registry, or ``NEAREST``.
        figures: the paper's, by column, of the table's first metric.
        settings: options and hyper-parameters that differ from the method's defaults.
        own: one of the systems that hashbridge is about; other rows are what these are compared with.
        oracle: it trains with the target's labels.
    """

    name: str
    method: str
    figures: dict[str, float] = {}  # noqa: RUF012  never changed
    settings: dict[str, Any] = {}  # noqa: RUF012
    own: bool = False
    oracle: bool = False


class Table(NamedTuple):
    """A table of a paper.

    Attributes:
        number: in the paper; 0 for a table of ours.
        title: what it shows.
        data: the paper's data, and what it is made of.
        metrics: of our results; the first is the paper's.
        rows: its rows, and ours beside them.
        alone: a row has one domain without labels, the target, and no source.
        bits: code lengths; columns of the figures name theirs if there are several.
        missing: rows of the paper that are not here, with the reason.
    """

    number: int
    title: str
    data: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    alone: bool = False
    bits: tuple[int, ...] = (64,)
    missing: str = ""

    def columns(self) -> list[str]:
        """The columns of the paper's figures."""
        return [column for column in dict.fromkeys(column for row in self.rows for column in row.figures) if column != "mean"]


def _along(columns: tuple[str, ...], *figures: float) -> dict[str, float]:
    """A row's figures by column."""
    return dict(zip(columns, figures, strict=True))


def _ablation(method: str) -> tuple[Row, ...]:
    """The rows of a method's ablation table, which are settings of one of our systems."""
    return tuple(Row(row.name, row.method or method, row.figures, row.changes, own=not row.method) for row in find_method(method).ablation)


OFFICE = tuple(f"{a} -> {b}" for a, b in itertools.permutations(("amazon", "dslr", "webcam"), 2))
HOME = tuple(f"{a} -> {b}" for a, b in itertools.permutations(("art", "clipart", "product", "real world"), 2))
S_M, M_U, U_M = "svhn -> mnist", "mnist -> usps", "usps -> mnist"
A_W, A_D, W_A, D_A = "amazon -> webcam", "amazon -> dslr", "webcam -> amazon", "dslr -> amazon"
RETRIEVED = (W_A, A_W, "clipart -> art", "art -> clipart", "art -> product", "art -> real world")  # Table 4 of DAH, in its order

OURS = (
    Row("IGAN", "igan", own=True), Row("IGAN, preset features", "igan", settings={"preset": "features"}, own=True), Row("CPH", "cph", own=True),
)  # fmt: skip
DAH_ROW, SUH = Row("DAH", "dah", own=True), Row("SuH (oracle)", "dpsh", oracle=True)
NODA = Row("source-only (NoDA)", "dpsh")
HASHES = tuple(Row(name, name) for name in ("lsh", "pca", "itq", "spectral", "kmeans-hash", "ba", "bdnn", "sgh", "ssdh"))
ADAPTED = tuple(Row(name.upper(), name) for name in ("tca", "jda", "gfk", "coral", "dan", "dann", "cdan", "mstn", "adda", "drcn"))
SIZES = tuple(f"{data}, {bits} bits" for data in ("cifar10", "flickr25k", "places365") for bits in (32, 64, 128))
AUTOENCODERS = ("AE-WGAN", "AE-LP", "AE-IW")


def _idr_ae(*figures: dict[str, float]) -> tuple[Row, ...]:
    """IDR-AE's tables: the hashes that it is compared with, and its variants by the tables' names."""
    names = {"LSH": "lsh", "SpecHash": "spectral", "ITQ": "itq", "SGH": "sgh", "SSDH": "ssdh"}
    variants = [row.changes for row in find_method("idr-ae").ablation[1:]]
    rows = [Row(name, method) for name, method in names.items()]
    rows += [Row(name, "idr-ae", settings=changes, own=name == "AE-IW") for name, changes in zip(AUTOENCODERS, variants, strict=True)]
    return tuple(row._replace(figures=found) for row, found in zip(rows, figures, strict=True))


def _retrieval(k: tuple[int, int, int], *figures: float) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """UCDIR's tables: metrics and rows, with the paper's means of the first metric."""
    metrics = tuple(f"cross/cosine_precision_at_{each}" for each in k)
    rows = zip(("ID", "ProtoNCE", "CDS", "PCS", "UCDIR"), ("id", "protonce", "cds", "pcs", "ucdir"), figures, strict=True)
    named = [Row(name, method, {"mean": figure}, own=method == "ucdir") for name, method, figure in rows]
    return metrics, (Row("features, by cosine", NEAREST), *named, Row("ProtoOT", "protoot", own=True))


_OFFICE_HOME, _OFFICE_31 = "Office-Home, VGG-F fine-tuned", "Office-31, VGG-F fine-tuned"
_AT_1, _HOME_ROWS = _retrieval((1, 5, 15), 33.18, 35.49, 37.17, 38.07, 40.67)
_AT_50, _NET_ROWS = _retrieval((50, 100, 200), 37.07, 37.21, 36.89, 41.23, 47.09)
_CONTRASTED = tuple(row._replace(figures={}) for row in _NET_ROWS[1:])  # the paper's are P@50, which a table of another first metric has not

TABLES: dict[str, tuple[Table, ...]] = {
    "dah": (
        Table(2, "recognition on Office", _OFFICE_31, (ACCURACY, CROSS, TARGET), (
            NODA, Row("GFK", "gfk", _along(OFFICE, 48.59, 52.08, 41.83, 89.18, 49.04, 93.17)),
            Row("TCA", "tca", _along(OFFICE, 51.00, 49.43, 48.12, 93.08, 48.83, 96.79)),
            Row("CORAL", "coral", _along(OFFICE, 54.42, 51.70, 48.26, 95.97, 47.27, 98.59)),
            Row("JDA", "jda", _along(OFFICE, 59.24, 58.62, 51.35, 96.86, 52.34, 97.79)),
            Row("DAN", "dan", _along(OFFICE, 67.04, 67.80, 50.36, 95.85, 52.33, 99.40)),
            Row("DANN", "dann", _along(OFFICE, 72.89, 72.70, 56.25, 96.48, 53.20, 99.40)), *_ablation("dah"), *OURS,
        )),
        Table(3, "recognition on Office-Home", _OFFICE_HOME, (ACCURACY, CROSS, TARGET), (
            NODA, Row("GFK", "gfk", _along(HOME, 21.60, 31.72, 38.83, 21.63, 34.94, 34.20, 24.52, 25.73, 42.92, 32.88, 28.96, 50.89)),
            Row("TCA", "tca", _along(HOME, 19.93, 32.08, 35.71, 19.00, 31.36, 31.74, 21.92, 23.64, 42.12, 30.74, 27.15, 48.68)),
            Row("CORAL", "coral", _along(HOME, 27.10, 36.16, 44.32, 26.08, 40.03, 40.33, 27.77, 30.54, 50.61, 38.48, 36.36, 57.11)),
            Row("JDA", "jda", _along(HOME, 25.34, 35.98, 42.94, 24.52, 40.19, 40.90, 25.96, 32.72, 49.25, 35.10, 35.35, 55.35)),
            Row("DAN", "dan", _along(HOME, 30.66, 42.17, 54.13, 32.83, 47.59, 49.78, 29.07, 34.05, 56.70, 43.58, 38.25, 62.73)),
            Row("DANN", "dann", _along(HOME, 33.33, 42.96, 54.42, 32.26, 49.13, 49.76, 30.49, 38.14, 56.76, 44.71, 42.66, 64.65)),
            Row("DAH-e", "dah", _along(HOME, 29.23, 35.71, 48.29, 33.79, 48.23, 47.49, 29.87, 38.76, 55.63, 41.16, 44.99, 59.07), {"entropy_weight": 0.0},
                own=True),
            DAH_ROW._replace(figures=_along(HOME, 31.64, 40.75, 51.73, 34.69, 51.93, 52.79, 29.91, 39.63, 60.71, 44.99, 45.13, 62.54)), *OURS,
        )),
        Table(4, "retrieval, mAP at 64 bits", "Office-31 and Office-Home, VGG-F fine-tuned", (CROSS, TARGET), (
            NODA._replace(figures=_along(RETRIEVED, 32.4, 51.1, 15.5, 16.0, 23.9, 28.1)),
            Row("ITQ", "itq", _along(RETRIEVED, 46.5, 65.2, 19.1, 19.5, 39.3, 32.3)),
            Row("KMeans", "kmeans-hash", _along(RETRIEVED, 40.3, 55.8, 17.0, 17.8, 34.1, 27.9)),
            Row("BA", "ba", _along(RETRIEVED, 36.7, 48.0, 15.6, 17.9, 34.9, 27.3)),
            Row("BDNN", "bdnn", _along(RETRIEVED, 49.1, 65.6, 19.3, 20.6, 40.7, 33.6)),
            DAH_ROW._replace(figures=_along(RETRIEVED, 58.2, 71.7, 30.2, 33.3, 41.4, 53.3)), *OURS,
            SUH._replace(figures=_along(RETRIEVED, 83.0, 93.9, 49.2, 62.2, 77.4, 58.6)),
        )),
    ),
    "igan": (
        Table(1, "recognition of digits", "SVHN, MNIST and USPS, pixels", (ACCURACY, CROSS, TARGET), (
            NODA, Row("MSTN", "mstn", _along((S_M, M_U), 91.7, 92.9)), Row("CDAN-M", "cdan", _along((S_M, M_U, U_M), 89.2, 96.5, 97.1)),
            Row("ADDA", "adda", _along((S_M, M_U, U_M), 76.0, 89.4, 90.1)), Row("DRCN", "drcn", _along((S_M, M_U, U_M), 82.0, 91.8, 73.7)),
            Row("Co-GAN", "cogan", _along((M_U, U_M), 91.2, 89.1)), Row("DAN", "dan"), Row("DANN", "dann"), DAH_ROW,
            Row("IGAN", "igan", _along((S_M, M_U, U_M), 95.6, 96.8, 97.8), own=True),
            Row("SIGAN", "sigan", own=True),
        ), missing="CyCADA (94.2 in the mean) and Duplex (95.8) need image translation networks of their own"),
        Table(2, "recognition on Office", "Office-31, AlexNet fine-tuned", (ACCURACY, CROSS, TARGET), (
            NODA, Row("MSTN", "mstn", _along((A_W, A_D, W_A, D_A), 80.5, 74.5, 60.0, 62.5)),
            Row("CDAN-M", "cdan", _along((A_W, A_D, W_A, D_A), 78.3, 76.3, 57.3, 57.3)),
            Row("ADDA", "adda", _along((A_W, A_D, W_A, D_A), 73.5, 71.6, 53.5, 54.6)), DAH_ROW,
            OURS[0]._replace(figures=_along((A_W, A_D, W_A, D_A), 79.5, 77.2, 62.2, 64.5)), *OURS[1:],
        ), missing="Duplex (67.0 in the mean) and I2I (62.2) need image translation networks of their own"),
        Table(3, "retrieval, mAP at 64 bits", "Office-31, AlexNet fine-tuned", (CROSS, TARGET), (
            NODA._replace(figures=_along((W_A, A_W, A_D), 32.4, 51.1, 51.2)), Row("ITQ", "itq", _along((W_A, A_W, A_D), 46.5, 65.2, 64.3)),
            Row("BDNN", "bdnn", _along((W_A, A_W, A_D), 49.1, 65.6, 66.8)), Row("BA", "ba", _along((W_A, A_W, A_D), 36.7, 48.0, 49.7)),
            DAH_ROW._replace(figures=_along((W_A, A_W, A_D), 58.2, 71.7, 72.1)),
            OURS[0]._replace(figures=_along((W_A, A_W, A_D), 61.2, 73.8, 74.6)), *OURS[1:],
            SUH._replace(figures=_along((W_A, A_W, A_D), 88.1, 91.6, 92.7)),
        )),
        Table(4, "what each term adds, recognition of digits", "SVHN, MNIST and USPS, pixels", (ACCURACY, CROSS, TARGET), _ablation("igan")),
    ),
    "idr-ae": (
        Table(1, "retrieval, P@1000", "CIFAR-10, Flickr25k and Places365, VGG-16's fc7", ("target/precision_at_1000", TARGET), _idr_ae(
            *(_along(SIZES, *figures) for figures in (
                (17.21, 17.31, 21.65, 1.31, 1.88, 2.28, 0.58, 1.01, 0.81), (19.95, 19.82, 19.30, 2.13, 2.33, 2.29, 0.75, 0.76, 0.74),
                (24.24, 25.85, 27.00, 2.64, 3.02, 3.05, 0.88, 0.96, 1.01), (16.72, 18.03, 18.88, 1.30, 1.37, 1.45, 0.61, 0.61, 1.37),
                (22.18, 17.66, 17.66, 2.60, 2.71, 2.82, 1.49, 1.60, 2.82), (19.48, 21.70, 22.84, 2.19, 2.69, 2.89, 1.58, 1.74, 1.81),
                (23.70, 24.06, 23.96, 2.22, 2.73, 2.93, 1.47, 1.89, 2.40), (26.92, 27.47, 29.61, 2.82, 3.36, 3.65, 2.05, 2.59, 3.01),
            )),
        ), alone=True, bits=(32, 64, 128)),
        Table(2, "retrieval, mAP at 64 bits", "CIFAR-10, Flickr25k and Places365, VGG-16's fc7", (TARGET, "target/precision_at_1000"), _idr_ae(
            *({"cifar10": c, "flickr25k": f, "places365": p} for c, f, p in (
                (14.77, 3.48, 1.01), (12.65, 5.35, 1.21), (18.24, 5.35, 1.63), (13.72, 1.96, 0.52), (16.64, 5.04, 1.07), (17.75, 6.42, 1.61),
                (17.77, 6.58, 1.65), (20.84, 7.90, 1.84),
            )),
        ), alone=True),
    ),
    "sigan": (
        Table(1, "recognition of digits", "SVHN and MNIST, pixels", (ACCURACY, CROSS, TARGET), (
            Row("GFK", "gfk", {S_M: 65.42}), Row("TCA", "tca", {S_M: 62.71}), Row("DANN", "dann", {S_M: 73.90}), *_ablation("sigan"),
        )),
    ),
    "ucdir": (
        Table(1, "retrieval without labels, P@1, P@5, P@15 by cosine", "Office-Home, ResNet-50 of MoCo v2 fine-tuned", _AT_1, _HOME_ROWS),
        Table(2, "retrieval without labels, P@50, P@100, P@200 by cosine", "DomainNet's 7 classes, ResNet-50 of MoCo v2 fine-tuned", _AT_50, _NET_ROWS),
        Table(3, "what each term adds, P@50, P@100, P@200 by cosine", "DomainNet's 7 classes, ResNet-50 of MoCo v2 fine-tuned", _AT_50, tuple(
            row._replace(figures={"mean": figure}) for row in _ablation("ucdir") for figure in row.figures.values()
        )),
    ),
    "all": (
        Table(0, "every row", "", (CROSS, TARGET, ACCURACY, "cross/precision_at_50"), (
            Row("features, by cosine", NEAREST), *HASHES, Row("idr-ae", "idr-ae", own=True), *_CONTRASTED, NODA, *ADAPTED, DAH_ROW, *OURS, SUH,
        )),
    ),
}  # fmt: skip


def find_tables(paper: str, number: int = 0) -> tuple[Table, ...]:
    """A paper's tables, or the one of this number.

    Raises:
        ValueError: there is no such paper or table.
    """
    if paper not in TABLES:
        raise ValueError(f"no paper {paper!r}: there are {', '.join(TABLES)}")
    found = tuple(table for table in TABLES[paper] if not number or table.number == number)
    if not found:
        raise ValueError(f"{paper} has no table {number} of results: there are {', '.join(str(table.number) for table in TABLES[paper])}")
    return found

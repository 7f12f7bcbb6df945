"""The methods by name. A new method is one file in ``models/methods`` and one line here."""

import difflib

from models.method import Method
from models.methods.adda import ADDA
from models.methods.adversarial import CDAN, DANN, MSTN
from models.methods.binary_autoencoders import BA, BDNN
from models.methods.classic import ITQ, LSH, PCA, KMeansHashing, SpectralHashing
from models.methods.cogan import CoGAN
from models.methods.cph import CPH
from models.methods.dah import DAH, DPSH
from models.methods.dan import DAN
from models.methods.drcn import DRCN
from models.methods.dtn import DTN
from models.methods.idr_ae import IDRAE
from models.methods.igan import IGAN
from models.methods.instance_contrast import CDS, ID, PCS, ProtoNCE
from models.methods.protoot import ProtoOT
from models.methods.sgh import SGH
from models.methods.sigan import SIGAN
from models.methods.ssdh import SSDH
from models.methods.subspaces import CORAL, GFK, JDA, TCA
from models.methods.ucdir import UCDIR

ALL = (
    DAH, DPSH, IGAN, CPH, SIGAN, DTN, IDRAE, UCDIR, ProtoOT, LSH, PCA, ITQ, SpectralHashing, KMeansHashing, BA, BDNN, SGH, SSDH,
    TCA, JDA, GFK, CORAL, DAN, DANN, CDAN, MSTN, ADDA, DRCN, CoGAN, ID, ProtoNCE, CDS, PCS,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in ALL}


def find_method(name: str) -> type[Method]:
    """Get a method by name.

    Raises:
        ValueError: it does not exist; suggests the closest name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}"
        raise ValueError(f"no method {name[:60]!r}: {hint}")
    return METHODS[name]

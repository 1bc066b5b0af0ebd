"""Valid uploads for a base small enough to write down, in every form a client may send: what the fuzzer starts from.

A draft is built in layers, tensors and config -> the two files -> members of an archive -> its bytes, so that a mutation
can happen in each and everything around it stays valid. Equal random states give equal bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from random import Random

import torch
import zstandard
from safetensors.torch import save

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.spec import AdapterSpec, BaseGeometry

LINEARS = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}
GEOMETRY = BaseGeometry(
    name="org/tiny",
    identity="nf4:1234",
    linear_shapes={f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LINEARS.items()},
)
PREFIX = "base_model.model."
ARCHIVE = "archive"
TRAP = "/loramux-fuzz-trap"  # a folder that is not there and that no upload may reach
CARRIERS = ("files", "zip", "stored zip", "tar", "gnu tar", "ustar", "tar.gz", "tar.zst")
_TAR_FORMATS = {"gnu tar": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
# What PEFT writes beside the fields we read, switched off.
_PEFT_NEUTRAL: dict[str, object] = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "layer_replication": None,
    "loftq_config": {}, "lora_bias": False, "megatron_config": None, "megatron_core": "megatron.core",
    "peft_version": "0.20.0", "qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_qalora": False,
}  # fmt: skip


@dataclass
class Member:
    """One entry of an archive. `kind` is tar's type byte; a zip knows files, folders and links."""

    name: str
    data: bytes
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    pax: dict[str, str] = field(default_factory=dict)


@dataclass
class Draft:
    """An upload in the making."""

    random: Random
    carrier: str
    config: dict[str, object]
    tensors: dict[str, torch.Tensor]
    files: dict[str, bytes] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    archive: bytes = b""

    @property
    def is_archive(self) -> bool:
        return self.carrier != "files"

    def serialize(self) -> None:
        """Tensors and config become the two files."""
        config = json.dumps(self.config)
        self.files = {CONFIG_FILE: config.encode("utf-8", "surrogatepass"), WEIGHTS_FILE: save(self.tensors)}

    def enlist(self) -> None:
        """The files become members, some in a folder, some beside a README."""
        folder = self.random.choice(("", "", "./", "my-adapter/"))
        self.members = [Member(folder + name, data) for name, data in self.files.items()]
        if self.random.random() < 0.3:
            self.members.append(Member(f"{folder}README.md", b"# an adapter"))
        if folder == "my-adapter/" and self.random.random() < 0.3:
            self.members.insert(0, Member(folder, b"", tarfile.DIRTYPE))

    def pack(self) -> None:
        """The members become one archive."""
        self.archive = pack(self.carrier, self.members)

    @property
    def parts(self) -> dict[str, bytes]:
        """What is uploaded, by part name."""
        return {ARCHIVE: self.archive} if self.is_archive else self.files


def draft(random: Random) -> Draft:
    """A random valid upload, its two files not yet written."""
    spec = _spec(random)
    dtypes = random.choice(
        ([torch.float32], [torch.bfloat16], [torch.float16], [torch.float32, torch.bfloat16])
    )
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    infix = random.choice(("", "", ".default"))
    tensors = {}
    for module in spec.targets(GEOMETRY):
        out_features, in_features = GEOMETRY.linear_shapes[module]
        rank = spec.rank(module)
        for kind, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            tensor = torch.randn(shape, generator=generator).to(random.choice(dtypes))
            tensors[f"{PREFIX}{module}.{kind}{infix}.weight"] = tensor
    config = spec.to_config() | (_PEFT_NEUTRAL if random.random() < 0.3 else {})
    return Draft(random, random.choice(CARRIERS), config, tensors)


def _spec(random: Random) -> AdapterSpec:
    targets = random.choice(
        (("q_proj", "v_proj"), ("self_attn.q_proj",), ("down_proj", "v_proj"), ("all-linear",))
    )
    patterned = random.random() < 0.3
    return AdapterSpec(
        r=random.choice((1, 2, 4)),
        lora_alpha=random.choice((1.0, 8.0, 16.5)),
        target_modules=targets,
        use_rslora=random.random() < 0.2,
        rank_pattern={"model.layers.0.self_attn.q_proj": 3} if patterned else {},
        alpha_pattern={"q_proj": 2.0} if patterned else {},
        base_model_name_or_path=random.choice((None, "org/tiny", "org/other")),
        base_identity=random.choice((None, "nf4:1234")),
    )


def pack(carrier: str, members: list[Member]) -> bytes:
    """`members` in the carrier's format, as far as it can say them; the same bytes every time."""
    if carrier.endswith("zip"):
        return _zip(members, zipfile.ZIP_STORED if carrier.startswith("stored") else zipfile.ZIP_DEFLATED)
    data = _tar(members, _TAR_FORMATS.get(carrier, tarfile.PAX_FORMAT))
    if carrier == "tar.gz":
        return gzip.compress(data, 1, mtime=0)
    return zstandard.compress(data, 1) if carrier == "tar.zst" else data


def _tar(members: list[Member], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname = member.kind, member.target
            info.size = len(member.data) if info.isreg() else 0
            info.pax_headers = member.pax
            try:
                archive.addfile(info, io.BytesIO(member.data))
            except (ValueError, UnicodeError):  # ustar has no room for the name, or no character set
                info.name = "unwritable"
                info.linkname, info.pax_headers = "", {}
                archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def _zip(members: list[Member], method: int) -> bytes:
    modes = {tarfile.SYMTYPE: 0o120777, tarfile.DIRTYPE: 0o040755, tarfile.FIFOTYPE: 0o010644}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there twice, which is the point
        for member in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = member.name.encode("utf-8", "replace").decode()[:60000]
            info.compress_type = method
            info.external_attr = modes.get(member.kind, 0o100644) << 16
            archive.writestr(info, member.target.encode() if member.kind == tarfile.SYMTYPE else member.data)
    return buffer.getvalue()

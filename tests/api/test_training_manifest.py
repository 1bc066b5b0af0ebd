"""What the trainer says of an adapter stays with it: published, downloaded, uploaded again, exported."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from loramux_adapters.access import OPERATOR
from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.export.loaded import load_adapters
from loramux_adapters.export.options import WeightedAdapter
from loramux_adapters.training.layout import MANIFEST_FILE
from loramux_server.exports.base import ExportBase
from loramux_server.exports.jobs import ExportRequest
from loramux_server.exports.manager import ExportManager
from tests.adapters.conftest import tiny_geometry
from tests.api.training_support import STEPS, Make, make, url_of

__all__ = ["make", "tiny_geometry"]  # fixtures

REQUEST = ExportRequest("merged", "served", 10**9, None, 16, compare=False, strict=False)


async def test_the_trainers_manifest_goes_where_the_model_goes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into its generation, its download, and the folder that an export reads; and so do the checkpoints'."""
    stand = make()
    monkeypatch.setattr(ExportBase, "needed_bytes", lambda self, format: 0)
    base = ExportBase((), tmp_path, "bfloat16", "nf4", "cpu", "an identity")
    job = await stand.until(await stand.create(validation_file=await stand.upload()), "succeeded")
    result = await stand.client.get(f"/v1/files/{job['result_files'][1]}/content")
    said = result.json()
    del said["format"]
    checkpoints = (await stand.get(f"{url_of(job)}/checkpoints"))["data"]
    early = checkpoints[-1]["fine_tuned_model_checkpoint"]
    for model, step in ((job["fine_tuned_model"], STEPS), (early, 2)):
        generation = stand.catalog.registry.get(model).generation
        expected = said | {"job": job["id"], "step": step, "loss_curve": said["loss_curve"][:step]}
        facts = stand.catalog.registry.store.manifest(generation).info
        assert facts["training"] == expected

        archive = (await stand.client.get(f"/v1/adapters/{model}/download")).content
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = {Path(one.name).name: tar.extractfile(one) for one in tar.getmembers()}
            assert list(members) == [*ADAPTER_FILES, MANIFEST_FILE]
            beside = members[MANIFEST_FILE]
            assert beside is not None
            assert json.loads(beside.read()) == expected
        back = await stand.client.post(
            "/v1/adapters", data={"name": "back", "overwrite": "1"}, files={"archive": archive}
        )
        assert back.json()["generation"] == generation, back.text
        # Who brings the same bytes is not told what somebody else trained them on.
        archive = (await stand.client.get("/v1/adapters/back/download")).content
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            assert [Path(one).name for one in tar.getnames()] == [*ADAPTER_FILES]

        exports = ExportManager(tmp_path / f"exports-{step}", stand.catalog.registry, base)
        export = await exports.create(model, [(model, 1.0)], REQUEST, OPERATOR)
        kept = export.folder.adapter(0, export.job.adapters[0])
        (loaded,) = load_adapters([WeightedAdapter(kept, 1.0)], stand.catalog.geometry)
        assert loaded.data == {"training": "5ha", "validation": "5hav"}
        await exports.close()

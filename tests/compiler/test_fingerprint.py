import subprocess
import sys

import msgspec
import pytest

from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.environment.machine import cpu_features, cpu_model, relevant_xla_flags


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from lepton_xla.compiler import Fingerprint; print(Fingerprint.of().digest)"
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == Fingerprint.of().digest


@pytest.mark.parametrize("field", Fingerprint.__struct_fields__)
def test_every_field_changes_the_digest(field: str) -> None:
    here = Fingerprint.of()
    other = msgspec.structs.replace(here, **{field: 99 if field == "device_count" else "other"})
    assert other.digest != here.digest
    assert [line.split(":")[0] for line in here.differences(other)] == [field]


def test_flags_that_cannot_change_code_are_left_out() -> None:
    text = "--xla_dump_to=/tmp/x --xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=8 --xla_a=1"
    assert relevant_xla_flags(text) == "--xla_a=1 --xla_cpu_max_isa=AVX2"


def test_cpu_features_are_those_of_every_core() -> None:
    assert cpu_features("flags\t\t: fpu avx2 avx512f\nmodel: 1\nflags\t\t: avx2 fpu\n") == ("avx2", "fpu")
    assert cpu_features("Features\t: fp asimd\n") == ("asimd", "fp")
    assert len(cpu_features("")) == 1


def test_the_processor_is_named_where_the_system_tells() -> None:
    assert cpu_model("flags : fpu\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n") == "Some CPU @ 2 GHz"
    assert isinstance(cpu_model(""), str)

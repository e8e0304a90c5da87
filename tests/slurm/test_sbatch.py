"""What sbatch itself reads from #SBATCH lines: exactly the values that they were made from."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_ext.launch.job_script import Resources
from tests.launch.batch import Batch, training_job
from tests.slurm.conftest import Cluster

# Runs on the login node: submits every script held, asks for what the controller understood, takes the jobs back.
_ASK = """
import subprocess, sys
from pathlib import Path
def call(*command):
    return subprocess.run(command, capture_output=True, check=True).stdout
for script in sorted(Path(sys.argv[1]).glob("*.sh")):
    job = call("sbatch", "--parsable", "--hold", str(script)).decode().strip()
    script.with_suffix(".said").write_bytes(call("squeue", "--noheader", "--jobs=" + job, "--format=%j\\x1f%k\\x1f%a"))
    call("scancel", job)
"""
# squeue prints a field without the white space at its ends.
VALUES = st.text(
    alphabet=st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\"'\\#$`;&| %"), min_size=1, max_size=40
).filter(lambda text: text == text.strip() and len(text.encode()) < 150)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=6))
@example([("it's", 'a "b" \\', "c#d"), ("#SBATCH", "--uid=0", "\\"), ("'", '"', "\\\\'\"")])
def test_sbatch_reads_names_accounts_and_comments_as_they_are(
    cluster: Cluster, tmp_path: Path, values: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    batch = Batch(tmp_path / "programs")
    for number, (name, comment, account) in enumerate(values):
        asked = Resources(account=account, extra=(f"comment={comment}",))
        script = training_job(tmp_path, batch, name=name, resources=asked).script()
        (folder / f"{number:02}.sh").write_text(script)
    done = cluster.lab.run([sys.executable, "-c", _ASK, str(folder)])
    assert done.returncode == 0, done.stderr
    said = [path.read_text().rstrip("\n").split("\x1f") for path in sorted(folder.glob("*.said"))]
    # SLURM keeps accounts in small letters.
    wanted = [[name, comment, account.lower()] for name, comment, account in values]
    assert [[name, comment, account.lower()] for name, comment, account in said] == wanted

"""What starts runs elsewhere: short, of flags that are ours, and started again as its place can."""

import json
import os
import re
import subprocess
import sys

import pytest

from recipes.training import checks, overrides, settings
from tests.conftest import ROOT

yaml = pytest.importorskip("yaml")

from tests.launch import jobset_schema  # noqa: E402

LAUNCH = ROOT / "launch"
FILES = sorted(path.name for path in LAUNCH.iterdir() if path.is_file())


def test_there_is_one_for_each_place_and_none_is_long():
    assert FILES == [
        "gpu_jobset.yaml", "jobset.yaml", "ray_run.py", "sky.yaml", "slurm.sh", "tpu_vm.sh"
    ]  # fmt: skip
    for name in FILES:
        assert len((LAUNCH / name).read_text().splitlines()) < 60, name


@pytest.mark.parametrize("name", [name for name in FILES if name != "ray_run.py"])
def test_every_flag_is_a_flag_and_they_go_together(name):
    text = re.sub(r"(?m)^# .*$", "", (LAUNCH / name).read_text())
    given = dict(re.findall(r"--config\.([\w.]+)(?:=([^\s\"]*(?:\"\$[^\"]*\")?))?", text))
    assert {"distributed.enabled", "hang_minutes", "minutes_per_checkpoint"} <= given.keys()
    assert "require_accelerator" in given
    known = {"coordinator_address": "host:9911", "mesh.fsdp": "8"}
    flags = ["--config.directory=/shared/run"]
    for setting, value in given.items():
        if "$" in value:  # what the place says
            value = known.get(setting.rpartition("distributed.")[2], "1")
        flags.append(f"--config.{setting}={value}" if value else f"--config.{setting}")
    config, others = overrides.read(
        ["dpo.py", f"--config={ROOT}/recipes/configs/llama8b.py", *flags], settings.ALL
    )
    assert others == ["dpo.py"]
    checks.checked(config, settings.table_of(settings.DPO))


def shell(script, *arguments, folder, **environment):
    """Runs a script where some commands only note what they are given, in `folder`/calls."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, does in STUBS.items():
        (stubs / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{does}\n')
        (stubs / name).chmod(0o755)
    path = f"{stubs}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], cwd=folder, capture_output=True, text=True,
        timeout=60, env={"PATH": path, "HOME": str(folder)} | environment,
    )  # fmt: skip


STUBS = {
    "srun": 'exit "$STATUS"', "scontrol": "", "sleep": "",
    # One host, which runs what it is sent.
    "gcloud": 'for last; do :; done\nbash -c "${last#--command=}"',
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "errors", "again"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (75, 9, True), (1, 2, True), (1, 3, False)],
)
def test_slurm_puts_back_into_its_queue_what_is_to_go_on(tmp_path, status, errors, again):
    (tmp_path / "slurm-7.errors").write_text("before\n" * errors)
    done = shell("slurm.sh", "--config=a b.py", folder=tmp_path, STATUS=str(status),
                 SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="4")  # fmt: skip
    assert done.returncode == status, done.stderr
    started, *queued = (tmp_path / "calls").read_text().splitlines()
    assert started.startswith("srun --kill-on-bad-exit=1 --label .venv/bin/python recipes/dpo.py")
    assert "--config.mesh.fsdp=4" in started
    assert started.endswith("--config=a b.py")  # last, so that it may change what stands before
    assert queued == (["scontrol requeue 7"] if again else [])


@pytest.mark.parametrize(("statuses", "starts"), [("0", 1), ("2", 1), ("75 75 1 0", 4), ("1", 4)])
def test_a_tpu_host_starts_its_process_again_until_it_is_done(tmp_path, statuses, starts):
    """Through two shells, with a word that both would take apart."""
    host = tmp_path / "nnx-zoo" / ".venv" / "bin"
    host.mkdir(parents=True)
    (host / "python").write_text(f"""#!/bin/bash
printf '%s\\n' "${{@: -1}}" >> {tmp_path}/starts
set -- {statuses}
shift $(( $(wc -l < {tmp_path}/starts) > $# ? $# - 1 : $(wc -l < {tmp_path}/starts) - 1 ))
exit $1
""")
    (host / "python").chmod(0o755)
    done = shell("tpu_vm.sh", "pod", "zone", '--config.name=it\'s "a" $b', folder=tmp_path)
    assert done.returncode == 0, done.stderr
    log = tmp_path / "nnx-zoo" / "run.log"
    for _ in range(200):
        if log.exists() and "ended with status" in log.read_text():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert f"ended with status {statuses.split()[-1]}" in log.read_text()
    assert (tmp_path / "starts").read_text() == '--config.name=it\'s "a" $b\n' * starts
    assert "--worker=all" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("name", jobset_schema.MANIFESTS)
def test_manifests_are_as_jobset_defines_them(name):
    schema = json.loads(jobset_schema.KEPT.read_text())
    found = jobset_schema.manifest(name)
    assert jobset_schema.problems(schema, found) == []
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (codes, _) = spec["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["containerName"] == container["name"]
    assert codes["onExitCodes"]["values"] == [2, 75]
    assert spec["parallelism"] == spec["completions"]
    stops, goes_on = found["spec"]["failurePolicy"]["rules"]
    # As Kubernetes words it: pkg/controller/job/pod_failure_policy.go.
    said = "Container dpo for pod a/b failed with exit code {} matching FailJob rule at index 0"
    matches = lambda rule, text: any(
        re.search(one, text) for one in rule["onJobFailureMessagePatterns"]
    )
    assert [matches(stops, said.format(n)) for n in (1, 2, 75, 25)] == [False, True, False, False]
    assert [matches(goes_on, said.format(n)) for n in (1, 2, 75)] == [False, False, True]
    assert matches(
        goes_on, "Pod a/b has condition DisruptionTarget matching FailJob rule at index 1"
    )


def test_the_nodes_of_a_jobset_find_each_other():
    found = jobset_schema.manifest("gpu_jobset")
    (job,) = found["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    jobset, name = found["metadata"]["name"], job["name"]
    assert f"coordinator_address={jobset}-{name}-0-0.{jobset}:9911" in container["args"][0]
    assert container["env"] == [
        {"name": "NODES", "value": str(job["template"]["spec"]["parallelism"])}
    ]


def test_what_a_schema_does_not_allow_is_found():
    schema = json.loads(jobset_schema.KEPT.read_text())
    wrong = jobset_schema.manifest("jobset")
    wrong["spec"]["failurePolicy"]["maxRestart"] = 1
    wrong["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJobset"
    wrong["spec"]["replicatedJobs"][0]["replicas"] = "2"
    assert [one.partition(":")[0] for one in jobset_schema.problems(schema, wrong)] == [
        ".spec.failurePolicy.rules[0].action", ".spec.failurePolicy",
        ".spec.replicatedJobs[0].replicas",
    ]  # fmt: skip


def test_skypilot_is_told_which_statuses_go_on():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    assert task["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 3, "recover_on_exit_codes": [75]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh", "gpu_jobset.yaml", "sky.yaml"])
def test_shells_can_read_them(name):
    text = (LAUNCH / name).read_text()
    if name == "sky.yaml":
        task = yaml.safe_load(text)
        text = f"{task['setup']}\n{task['run']}"
    elif name == "gpu_jobset.yaml":
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        text = container["args"][0]
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Ray's few names that are used, without Ray: hosts are objects, and statuses come from a file.
RAY = """
import json, pathlib, subprocess, types
CALLS = pathlib.Path(__file__).parent / "calls"
STATUSES = pathlib.Path(__file__).parent / "statuses"
class RayError(Exception): pass
exceptions = types.SimpleNamespace(RayError=RayError)
util = types.SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")
def note(*words):
    with CALLS.open("a") as file: print(*words, file=file)
def call(command, preexec_fn):
    note(*command[1:])
    first, *rest = json.loads(STATUSES.read_text())
    STATUSES.write_text(json.dumps(rest))
    return first
subprocess.call = call
class Method:
    def __init__(self, method): self.method = method
    def remote(self, *given): return self.method(*given)
class Actor:
    def __init__(self, kind): self.own = kind()
    def __getattr__(self, name): return Method(getattr(self.own, name))
class Kind:
    def __init__(self, kind): self.kind = kind
    def options(self, **how): note(json.dumps(how, sort_keys=True)); return self
    def remote(self): return Actor(self.kind)
remote = Kind
def init(): pass
def kill(actor): note("kill")
def wait(left, num_returns=1, timeout=None): return left[:num_returns], left[num_returns:]
def get(value):
    if value == "lost": raise RayError
    return value
"""


@pytest.mark.parametrize(
    ("statuses", "status", "attempts"),
    [
        ([0, 0], 0, 1),
        ([2, 2], 2, 1),
        ([75, 75, 0, 75, 0, 0], 0, 3),
        (["lost", 0, 0, 0], 0, 2),
        ([1, 1] * 4, 1, 4),
        ([75, 75] * 9 + [0, 0], 0, 10),
    ],
)
def test_ray_starts_all_again_until_they_are_done(tmp_path, statuses, status, attempts):
    (tmp_path / "ray.py").write_text(RAY)
    (tmp_path / "statuses").write_text(json.dumps(statuses))
    done = subprocess.run(
        [sys.executable, LAUNCH / "ray_run.py", "--hosts=2", "--gpus=8", "--", "recipes/dpo.py",
         "--config=a.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    how, *calls = (tmp_path / "calls").read_text().splitlines()
    assert json.loads(how)["num_gpus"] == 8
    starts = [call for call in calls if call != "kill"]
    assert len(starts) == len(calls) - len(starts) == 2 * attempts
    told = "recipes/dpo.py --config=a.py --config.distributed.enabled=True"
    told += " --config.distributed.coordinator_address=10.0.0.1:9911"
    told += " --config.distributed.num_processes=2 --config.distributed.process_id="
    assert starts == [told + str(i) for i in (0, 1)] * attempts

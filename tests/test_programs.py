"""Every program of the project ends in one frame: a sentence on stderr and a status, no traceback.

Each is started with each kind of wrong word.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TINY

CONFIG = "--config=recipes/configs/tiny.py"
SFT_CONFIG = "--config=recipes/configs/tiny_sft.py"
# What takes a config, and how it is told which weights or tokenizer to read.
WITH_CONFIG = {
    "recipes/dpo.py": "initialize_from_hf",
    "recipes/forecast.py": "initialize_from_hf",
    "recipes.data": "initialize_from_hf",
}
MEASURE = (
    "accelerator", "attention", "compare", "everything", "experts", "growth", "harness", "layouts",
    "ours", "ranked", "real_pairs", "recurrences", "sampling", "start", "sweep", "tokenisation",
)  # fmt: skip
BENCHMARKS = [f"benchmarks/{name}.py" for name in MEASURE]
PROGRAMS = [
    *WITH_CONFIG, "recipes/sft.py", "recipes/score.py", "recipes/export.py", "recipes/report.py",
    "recipes/measure.py", "recipes/sample_pairs.py", "recipes/pipeline.py", "recipes/translate.py",
    "recipes/tiny/make_model.py", "recipes/tiny/make_pairs.py",
    "zoo", *BENCHMARKS,
]  # fmt: skip
# A process for each measurement, no flags, and a folder without a flag.
# In environments of their own.
PEERS = {"benchmarks/peer_trl.py", "benchmarks/peer_tunix.py", "benchmarks/vllm_serves.py"}
OTHERS = [
    "benchmarks/models.py", "benchmarks/peak.py", "benchmarks/where.py",
    "recipes/training/listing.py", "recipes/peers/listing.py",
]  # fmt: skip


# What is asked for before a word that is not a flag is looked at.
NEEDING = [
    "benchmarks/everything.py", "benchmarks/harness.py", "benchmarks/ours.py",
    "benchmarks/ranked.py", "benchmarks/real_pairs.py", "benchmarks/sampling.py",
    "benchmarks/tokenisation.py",
]  # fmt: skip


def of_configs(folder):
    """Wrong words that every program with a config must answer, and what the sentence says."""
    broken = folder / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    derived = folder / "derived.py"
    derived.write_text(
        "from recipes.configs import tiny\n\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.beta = '0.1'\n    return config\n"
    )
    leaving = folder / "leaving.py"
    leaving.write_text("import sys\n\ndef get_config():\n    sys.exit()\n")
    # Who has run the demo has a run in its directory, which is of other settings.
    fresh = [CONFIG, f"--config.directory={folder}/fresh"]
    nowhere = f"--config.initialize_from_hf={folder}/nowhere"
    empty = folder / "empty"
    empty.mkdir()
    file = folder / "file"
    file.write_text("")
    return [
        (["--config.beta=1"], ["give a config", "--config=recipes/configs/tiny.py"], 2),
        (["recipes/configs/tiny.py"], ["write --config=recipes/configs/tiny.py"], 2),
        (["--config=recipes/configs/nothing.py"], ["nothing.py"], 2),
        (["--config=recipes"], ["no config file 'recipes'"], 2),
        ([CONFIG, CONFIG], ["two configs"], 2),
        (["--config=recipes/data/chats/chat.py"], ["get_config"], 2),
        (["--config=README.md"], ["README.md"], 2),
        ([f"--config={broken}"], ["broken.py, line 2: ZeroDivisionError"], 2),
        ([f"--config={leaving}"], ["leaving.py, line 4: SystemExit"], 2),
        ([f"--config={derived}"], ["--config.beta='0.1' is not a number"], 2),
        ([CONFIG, "--config.betta=0.2"], ["'betta'", "did you mean beta?"], 2),
        ([CONFIG, "--config.data.layot=a"], ["did you mean data.layout?"], 2),
        ([CONFIG, "--config.batch_size=8"], ["did you mean train_batch_size?"], 2),
        ([CONFIG, "--config.num_train_epochs=1"], ["did you mean num_epochs?"], 2),
        ([CONFIG, "--config.reference_model=a"], ["did you mean reference_model_path?"], 2),
        ([CONFIG, "--max_steps=5"], ["write --config.num_train_steps=5"], 2),
        ([CONFIG, "--config.data.mask_user_turns"], ["did you mean data.scored_turns?"], 2),
        ([CONFIG, "--config.validation.heldout.weight=2"], ["weight has no effect"], 2),
        ([CONFIG, "--config.lr=1e-5"], ["did you mean learning_rate?"], 2),
        ([CONFIG, "--config.beta=much"], ["--config.beta='much' is not a number"], 2),
        ([CONFIG, "--config.mesh.fsdp=8x"], ["mesh.fsdp='8x' is not a whole number"], 2),
        ([CONFIG, "--config.tensorboard=maybe"], ["tensorboard='maybe' is not true or false"], 2),
        ([CONFIG, "--config.data.columns={1: 2}"], ["data.columns='{1: 2}' cannot be parsed"], 2),
        ([CONFIG, "--config.validation={'a.b': 'c'}"], ["cannot be parsed"], 2),
        ([CONFIG, "--flagfile=nowhere"], ["nowhere"], 2),
        ([CONFIG, "--", "--config.beta=x"], ["beta='x' is not a number"], 2),
        ([CONFIG, "--config.mesh=8"], ["mesh.data, mesh.fsdp, mesh.context, mesh.tensor"], 2),
        ([CONFIG, "--config.beta"], ["--config.beta needs a value"], 2),
        ([CONFIG, "--config.beta="], ["--config.beta has an empty value"], 2),
        ([CONFIG, "--config.beta=None"], ["--config.beta cannot be unset"], 2),
        ([CONFIG, "--config.data.columns=a"], ["data.columns='a' is not written like"], 2),
        ([CONFIG, "--config.train_data={a"], ["train_data='{a' cannot be parsed"], 2),
        ([CONFIG, "--config.train_data.a.path=b"], ["is a single source, 'recipes/tiny/train"], 2),
        ([CONFIG, "--learning_rate=1e-5"], ["write --config.learning_rate=1e-5"], 2),
        ([CONFIG, "--learning-rate", "1"], ["write --config.learning_rate="], 2),
        ([CONFIG, "--nothing=1"], ["--nothing", "--config.NAME=VALUE"], 2),
        ([CONFIG, "--confg.beta=1"], ["confg"], 2),
        ([CONFIG, "extra"], ["'extra'"], 2),
        ([CONFIG, "beta=0.2"], ["write --config.beta=0.2"], 2),
        ([CONFIG, "config.beta=0.2"], ["write --config.beta=0.2"], 2),
        ([CONFIG, "\u2014config.beta=0.2"], ["write --config.beta=0.2"], 2),
        ([CONFIG, "--config.beta=0"], ["beta must be above 0"], 2),
        ([CONFIG, "--config.num_epochs=2"], ["add --config.num_train_steps=None"], 2),
        ([CONFIG, "--config.num_train_steps=None"], ["set one of"], 2),
        ([CONFIG, "--config.validation=a.jsonl"], ["write --config.validation.heldout=a"], 2),
        ([CONFIG, "--config.reference_is_hf=false"], ["--config.reference_model_path="], 2),
        ([*fresh, nowhere], ["no model folder", "nowhere"], 1),
        ([*fresh, "--config.initialize_from_hf=owner/name"], ["hub could not be reached"], 1),
        ([*fresh, f"--config.initialize_from_hf={empty}"], ["empty"], 1),
        ([*fresh, f"--config.initialize_from_hf={file}"], ["file"], 1),
    ]


def of_one(folder):
    """Wrong words of single programs."""
    here = [CONFIG, f"--config.directory={folder}/run", f"--config.token_cache={folder}/tokens"]
    (folder / "rows.txt").write_text("")
    (folder / "bare").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / "bare" / name).write_bytes((TINY / "model" / name).read_bytes())
    for program in ("recipes/dpo.py", "recipes.data"):
        for data, told in {
            "nothing.jsonl": "no data file",
            f"{folder}/rows.txt": "rows.txt",
            "owner/name": "owner/name",
        }.items():
            yield program, [*here, f"--config.train_data={data}"], [told], 1
            yield program, [*here, f"--config.validation.more={data}"], [told], 1
    for program in ("recipes/forecast.py", "recipes.data"):
        yield program, [], ["--config=recipes/configs/tiny.py"], 2
    bare = f"--config.initialize_from_hf={folder}/bare"
    yield "recipes/dpo.py", [*here, bare], ["bare"], 1
    yield "recipes/dpo.py", [*here, "--config.directory=file:///a/run"], ["a path on this"], 1
    yield "recipes/dpo.py", [*here, "--config.directory=gs://a"], ["gs://BUCKET/FOLDER"], 1
    yield "recipes/dpo.py", [*here, "--config.mesh.fsdp=3"], ["does not fit 1 devices"], 1
    yield "recipes/dpo.py", [*here, "--config.min_pack_fill=0.99"], ["would be filled"], 1
    yield "recipes/dpo.py", [*here, "--config.reference_model_path=no/where/at/all"], ["where"], 1
    yield "recipes/dpo.py", ["--config=recipes/configs/llama8b.py"], ["set --config.directory"], 2
    for program in ("recipes/dpo.py", "recipes/forecast.py"):
        yield program, [*here, "--config.loss=DPO"], ["it is called sigmoid here"], 1
        yield program, [*here, "--config.loss=simpo"], ["a usual beta of 2 to 10"], 1
        yield program, [*here, "--config.cpo_alpha=1"], ["no effect", "only applies to cpo"], 1
    score = "recipes/score.py"
    yield score, [CONFIG], ["policy and reference are both recipes/tiny/model"], 2
    yield score, [CONFIG, "--config.betta=0.2"], ["did you mean beta?"], 2
    yield score, [CONFIG, "--config.beta=much"], ["--config.beta='much' is not a number"], 2
    yield score, [CONFIG, "--config.num_train_steps=3"], ["scoring trains nothing"], 2
    sft = "recipes/sft.py"
    yield sft, ["recipes/configs/tiny_sft.py"], ["write --config=recipes/configs/tiny_sft.py"], 2
    yield sft, [SFT_CONFIG, "--config.lr=1e-5"], ["did you mean learning_rate?"], 2
    yield sft, [SFT_CONFIG, "--config.beta=0.1"], ["has no setting 'beta'"], 2
    yield sft, [SFT_CONFIG, "--config.train_seq_len=0"], ["train_seq_len must be above 0"], 2
    yield sft, [CONFIG], ["has an unknown setting"], 2
    yield sft, [SFT_CONFIG, "--config.train_data=nothing.jsonl"], ["no data file"], 1
    report = "recipes/report.py"
    yield report, [], ["give the directory of a run"], 1
    yield report, [f"{folder}/nothing"], ["nothing is not the directory of a run"], 1
    yield report, ["runs/tiny", "--pag=a.html"], ["did you mean --page?"], 2
    page = f"--page={folder}/no/page.html"
    yield "recipes.data", [*here, page], ["no/page.html"], 1
    yield "recipes.data", [*here, f"--pag={folder}/page.html"], ["did you mean --page?"], 2
    yield "recipes/forecast.py", [CONFIG, "--chip=h1000"], ["did you mean h100?"], 1
    yield "recipes/forecast.py", [CONFIG, "--devices=many"], ["--devices", "many"], 2
    yield "recipes/forecast.py", [CONFIG, "--devices=0"], ["--devices must be above 0"], 1
    yield "recipes/forecast.py", [CONFIG, "--chip=v5e", "--devices=3"], ["slice of v5e"], 1
    yield "recipes/forecast.py", [CONFIG, "--config.mesh.fsdp=3"], ["does not fit 8 devices"], 1
    yield "recipes/export.py", [], ["give the directory of one run, not none"], 1
    yield "recipes/export.py", [f"{folder}", "more"], ["of one run, not ", " more"], 1
    yield "recipes/export.py", [f"{folder}", "--step=x"], ["--step='x' is not a whole number"], 2
    yield "recipes/export.py", [f"{folder}"], ["not the directory of a run"], 1
    translate = "recipes/translate.py"
    yield translate, [], ["give one file: python -m recipes.translate"], 1
    yield translate, ["nothing.yaml"], ["there is no file nothing.yaml"], 1
    yield translate, [f"{folder}/rows.txt"], ["rows.txt is not a file of settings"], 1
    yield translate, ["a.yaml", "--devices=0"], ["--devices must be above 0"], 1
    yield translate, ["a.yaml", "--out=b.py"], ["there is no flag --out"], 2
    measure = "recipes/measure.py"
    yield measure, ["--tasks=a"], ["give --model="], 2
    yield measure, ["--num_fewshot=-1"], ["--num_fewshot=-1 must be at least 0"], 2
    has_harness = importlib.util.find_spec("lm_eval")
    first = "no model folder" if has_harness else "lm-evaluation-harness is not installed"
    yield measure, [f"--model={folder}/nowhere", "--tasks=a"], [first], 1
    yield measure, ["--model=a", "--tasks=a", "--limit=x"], ["--limit='x' is not"], 2
    pipeline = "recipes/pipeline.py"
    yield pipeline, [], ["give --config="], 2
    yield pipeline, ["--config=a", f"--directory={folder}"], ["no file --config=a"], 1
    sample = "recipes/sample_pairs.py"
    yield sample, [], ["give --model="], 2
    given = ["--model=a", "--prompts=b", f"--directory={folder}/c"]
    yield (
        sample,
        given,
        ["give exactly one judge, by one of --judge, --reward_model, --reference"],
        1,
    )
    yield sample, [*given, "--judge=a:b", "--answers=1"], ["--answers=1 must be at least 2"], 2
    yield sample, [*given, "--temperature=0"], ["--temperature=0 must be at least 0.01"], 2
    yield sample, [*given, "--judge=nothing:b"], ["--judge=nothing:b cannot be found"], 1
    make = "recipes/tiny/make_model.py"
    yield make, [], ["give --folder="], 2
    yield make, [f"--folder={folder}/rows.txt"], ["rows.txt: File exists"], 1
    yield make, [f"--fold={folder}/a"], ["did you mean --folder?"], 2
    yield make, [f"folder={folder}/a"], ["give --folder="], 2
    yield "recipes/tiny/make_pairs.py", ["--out=a"], ["no flag --out"], 2
    yield "recipes/tiny/make_pairs.py", ["a"], ["'a' is not a flag"], 2
    for program in BENCHMARKS:
        yield program, ["extra"], ["give --" if program in NEEDING else "'extra' is not a flag"], 2
        yield program, ["--nothing=1"], ["there is no flag --nothing"], 2
    compare, growth = "benchmarks/compare.py", "benchmarks/growth.py"
    yield compare, ["--size=Z"], ["--size=Z", "A|B"], 2
    yield compare, ["--rounds=0"], ["--rounds=0"], 2
    yield compare, ["--steps=x"], ["--steps='x' is not a whole number"], 2
    yield compare, ["--peer=trl"], ["like trl=trl/bin/python"], 1
    yield "benchmarks/layouts.py", ["--prompt_share=x"], ["prompt_share='x' is not a number"], 2
    yield "benchmarks/accelerator.py", ["--chip=h1000"], ["h100|h200"], 2
    yield growth, ["--kinds=xml"], ["--kinds=xml is none of jsonl"], 1
    yield growth, ["--ways=fast"], ["--ways=fast is none of read"], 1
    yield growth, ["--rows=x"], ["--rows=x is not a number of rows"], 1
    yield "benchmarks/ours.py", [f"--folder={folder}/nowhere"], ["nowhere/pairs.jsonl"], 1
    words = [f"--tokenizer={folder}/nowhere", "--rows=a.json"]
    yield "benchmarks/tokenisation.py", words, ["holds no tokenizer"], 1
    yield "zoo", ["chat"], ["give python -m zoo chat FOLDER"], 2
    yield "zoo", ["chat", "a", "--temp=1"], ["no flag --temp: --against, --base"], 2
    yield "zoo", ["chat", "a", "--tokens=x"], ["--tokens='x' is not a number"], 2
    yield "zoo", ["chat", "a", "--top_p=0.9"], ["without a temperature"], 1
    yield "zoo", ["chat", f"{folder}/nowhere"], ["no model folder"], 1
    yield "zoo", [], ["python -m zoo PATH-OR-ID"], 2
    yield "zoo", ["--model=a"], ["no flag --model=a"], 2
    yield "zoo", [f"{folder}/nowhere"], ["no model folder"], 1
    yield "zoo", ["owner/name"], ["hub could not be reached"], 1
    yield "zoo", [f"{folder}/rows.txt"], ["no model folder"], 1
    yield "zoo", [f"{folder}/bare"], ["bare"], 1


def test_no_program_is_forgotten():
    known = {*PROGRAMS, *OTHERS, "recipes/data/__main__.py", "zoo/__main__.py"}
    for folder in ("zoo", "checkpoints_io", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            named = str(path.relative_to(ROOT))
            assert ("\nif __name__ ==" in path.read_text()) <= (named in known | PEERS), named


def test_a_pipe_that_closes_is_not_the_models_fault():
    """`python -m zoo MODEL | true`: it ends as shells expect."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "recipes/tiny/model"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    asked = [(program, *one) for one in of_configs(folder) for program in WITH_CONFIG] + [
        *of_one(folder)
    ]
    asked += [(program, [flag], [], 0) for program in PROGRAMS for flag in ("--help", "-h")]
    done = subprocess.run(
        [sys.executable, "tests/programs.py"],
        input=json.dumps([[program, *arguments] for program, arguments, _, _ in asked]),
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    return list(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_wrong_words_are_answered_by_a_sentence(answers, program):
    for (started, arguments, told, status), (code, out, err) in answers:
        if started != program:
            continue
        assert (code, "Traceback" in out + err) == (status, False), (arguments, out[-999:], err)
        if status == 0:  # --help
            assert out.strip() and "rror" not in err, (arguments, err)
            continue
        sentences = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, (arguments, err)
        for part in told:
            assert part in sentences[0], (arguments, sentences)

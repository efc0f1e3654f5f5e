"""The promises, one row each: what is promised, the function that tries to break it, and how often."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """`function` is `file:name`, called as `(seed, tries) -> failures`.

    `tries` are those of the ordinary tests (0: only with --full), `full` those of --full. A try that takes more than
    `seconds`, some fifty times what it needs, is a failure. `devices` are those that the worker forces.
    """

    name: str
    promise: str
    function: str
    tries: int
    full: int
    seconds: float = 30.0
    devices: int = 1
    each: float = 0.1  # seconds that a try takes, about: long rows start first

    def cost(self, full):
        return self.each * (self.full if full else self.tries)


HOSTILE = "a mutated {} is a named error or a right load: memory and time bounded, no code runs"

ROWS = (
    Row("kills.random", "kill -9 at any moment: the newest valid step is the last saved one, bit for bit",
        "kills:at_random_moments", 1, 36, seconds=300, each=9),
    Row("kills.points", "kill -9 at every named point of a save, an evaluation, a row of metrics: the same",
        "kills:at_named_points", 0, 20, seconds=300, each=9),
    Row("kills.group", "kill -9 of runs in one step (--runs): they go on from a step that all have, bit for bit",
        "kills:of_a_group", 0, 20, seconds=300, each=12),
    Row("peers.dead", "a peer that dies ends the others with an error, and what was saved is valid", "peers:dead",
        0, 3, seconds=330, each=60),
    Row("configs", "a wrong config is refused by name, before jax is imported", "configs:from_schema",
        250, 2000, seconds=120, each=0.01),
    Row("hostile.safetensors", HOSTILE.format("safetensors file"), "hostile:safetensors", 40, 1500, each=0.02),
    Row("hostile.index", HOSTILE.format("index of shards"), "hostile:index", 20, 600, each=0.02),
    Row("hostile.config_json", HOSTILE.format("config.json of a base"), "hostile:config_json", 40, 1500, each=0.02),
    Row("hostile.tokenizer_json", HOSTILE.format("tokenizer.json"), "hostile:tokenizer_json", 30, 1000, each=0.02),
    Row("hostile.tokenizer_config", HOSTILE.format("tokenizer_config.json"), "hostile:tokenizer_config", 30, 600,
        each=0.02),
    Row("hostile.generation_config", HOSTILE.format("generation_config.json"), "hostile:generation_config", 20, 600,
        each=0.02),
    Row("hostile.chat_template", HOSTILE.format("chat_template.jinja"), "hostile:chat_template", 20, 600, each=0.02),
    Row("hostile.gguf", HOSTILE.format("GGUF file"), "hostile:gguf", 40, 1500, each=0.03),
    Row("hostile.jsonl", HOSTILE.format("row of data"), "hostile:jsonl", 40, 1500, each=0.03),
    Row("hostile.parquet", HOSTILE.format("parquet file"), "hostile:parquet", 20, 1500, each=0.03),
    Row("hostile.config_file", "a mutated config file (.py) is a named error or a config", "hostile:config_file",
        30, 600, each=0.02),
    Row("hostile.run_config", HOSTILE.format("config.json of a run"), "hostile:run_config", 30, 600, each=0.02),
    Row("hostile.data_cache", "a mutated file of the data cache is made anew: no pickle is read, no bomb inflates",
        "hostile:data_cache", 30, 600, each=0.02),
    Row("hostile.metrics", "a mutated metrics.jsonl is cut to its rows and drawn, or refused by name",
        "hostile:metrics", 4, 120, each=0.3),
    Row("hostile.manifest", "a manifest made by hand, checksum and all, changes no value without a word",
        "hostile:manifest", 3, 250, each=0.2),
    Row("templates.bombs", "a template that would hang, fill memory or the screen ends in a named error",
        "templates:bombs", 0, 36, seconds=20, each=3),  # io/test_templates has them at a lower limit
    Row("templates.escapes", "a template reads no object of ours, no file, changes nothing and runs no code",
        "templates:escapes", 48, 192, seconds=20, each=0.02),
    Row("rows.bad", "a bad row is named (file and row), or skipped and counted, and the good ones are all there",
        "datarows:bad_rows", 30, 600, each=0.05),
    Row("rows.parquet", "a bad row of a parquet file is named, or skipped and counted, and the good ones are all there",
        "datarows:bad_parquet_rows", 8, 300, each=0.06),
    Row("rows.unusable", "a file without a usable row is refused by name", "datarows:unusable", 18, 72, each=0.02),
    Row("rows.processes", "samples are one global sequence for every number of processes and every start",
        "datarows:process_counts", 10, 200, each=0.05),
    Row("damage.checkpoint", "damage to any file of a step: the step is skipped by name, an older one is whole",
        "damage:checkpoint", 5, 250, each=0.4),
    Row("damage.evaluated", "damage to a run's records changes what evaluate opens with a named error or a word",
        "damage:evaluated", 4, 196, each=0.4),
    Row("damage.resumed", "damage to a run's records changes what a start goes on from with an error or a word",
        "damage:resumed", 3, 140, each=0.4),
    Row("damage.metrics", "damage to metrics.jsonl changes no state, and what is lost of it is said",
        "damage:metrics", 2, 36, each=1.5),
    Row("damage.lock", "damage to a lock that nobody holds: a start goes on, or names it", "damage:lock", 3, 36,
        each=0.4),
    Row("damage.verify", "launch.verify ends with status 1 exactly where a step is not valid", "damage:verify", 3, 100,
        each=0.5),
    Row("damage.data_cache", "damage to tokenised data in the cache: it is made again, and said", "damage:data_cache",
        21, 400, each=0.03),
    Row("damage.converted", "damage to a converted base in the cache: an error that names it, or the same base",
        "damage:converted", 35, 420, each=0.03),
    Row("saves.checkpoint", "a failed save is known, older steps stay, temporaries go, the next save works",
        "saves:checkpoint", 6, 300, each=0.5),
    Row("saves.run", "a disk that fails anywhere in a run: one message, a valid step, the same bits after a resume",
        "saves:run", 1, 24, seconds=300, each=8),
    Row("saves.gone", "a workdir that is removed during a run ends it with an error", "saves:gone", 1, 9, seconds=300,
        each=5),
    Row("signals.run", "SIGTERM or SIGINT at any moment of a run: a valid step, and the same bits after a resume",
        "interrupts:in_a_run", 1, 27, seconds=300, each=8),
    Row("signals.twice", "a second signal ends a run that does not answer the first", "interrupts:twice", 0, 4,
        seconds=300, each=10),
    Row("nonfinite.gradients", "a step without finite gradients is skipped as a whole and counted",
        "nonfinite:gradients", 0, 12, seconds=300, each=5),
    Row("nonfinite.padding", "a batch of padding alone has loss 0 and no NaN", "nonfinite:padding", 0, 8, seconds=300,
        each=5),
    Row("nonfinite.base", "a base weight that is not finite is refused by its name", "nonfinite:base", 12, 200,
        each=0.03),
    Row("nonfinite.adapters", "an adapter that is not finite is refused before it reaches a device",
        "nonfinite:adapters", 2, 40, seconds=300, each=2),
    Row("meshes.restored", "a run opens on 1, 2, 4 and 8 devices, whatever the axes: every bit of its state the same",
        "meshes:restored", 0, 54, devices=8, seconds=300, each=1),
    Row("meshes.saved", "a run saved on any mesh opens on any other", "meshes:saved", 0, 6, devices=8, seconds=300,
        each=12),
    Row("meshes.exact", "train.exact: losses and state are bit-equal on 1, 2, 4 and 8 devices (data, fsdp)",
        "meshes:exact", 0, 7, devices=8, seconds=300, each=20),
    Row("meshes.processes", "a run of one process goes on with two, on the same samples, and back",
        "meshes:processes", 0, 2, seconds=300, each=60),
    Row("writers.lock", "one writer a workdir: the others are told who has it", "writers:lock", 20, 200, each=0.01),
    Row("writers.killed", "the workdir of a killed writer is free at once", "writers:killed", 1, 20, each=1),
    Row("writers.cache", "starts that convert the same base at once all get the same one", "writers:cache", 3, 60,
        each=0.1),
    Row("changes.run", "another base, tokenizer, template or number of the config under a run is refused or said",
        "changes:under_a_run", 12, 24, seconds=300, each=0.6),
    Row("changes.cache", "tokenised data in the cache belong to their tokenizer and template", "changes:under_a_cache",
        12, 12, each=0.1),
)  # fmt: skip

SELFTEST = Row("selftest", "the runner notices what hangs, dies or raises", "selftest:faults", 7, 7, seconds=1.0)

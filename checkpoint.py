"""What is on disk: our checkpoints, and folders in Hugging Face's format, in and out.

    python checkpoint.py export runs/laptop exported     # a folder that transformers loads, checked against it
    >>> model = from_pretrained("Qwen3-0.6B")            # a folder in Hugging Face's format, or one of our runs

A checkpoint, runs/NAME/checkpoints/step-NNNNNNNN, is model.pt (weights by name, fp32) and optimizer.pt (moments, absent
before the first update), read with weights_only; config.json, training.json (what the training loop wants back),
tokenizer.json and the chat format; last manifest.json, the sha256 of the others. It is the same for any number of
processes: the first gathers everything in its host memory (12 bytes a parameter, 37 GB for 3B), writes in a thread and,
to load, broadcasts. A folder is written as NAME.partial, synced and renamed, so one that has its name is whole.
"""

import json
import os
import pickle
import re
import shutil
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizer import (ChatFormat, Tokenizer, UserError, draw, file_sha256, installed, read_json, reading, run,
                       write_json, write_text)

import torch
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model import GPT, ModelConfig

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}  # name -> module
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}"
                 "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
EXACT = "e_score_correction_bias"  # chooses experts, so it stays in fp32: in bf16 it would choose others


# ---- a run's folder and its log -------------------------------------------------------------------------------
def new_run_folder(name):
    """runs/name, or runs/name-2, runs/name-3, ... : no run is overwritten."""
    folders = (Path("runs", f"{name}-{number}" if number > 1 else name) for number in range(1, 10**9))
    return next(folder for folder in folders if not folder.exists())


def check_trackers(names):
    for name in filter(None, names.split(",")):
        if name not in TRACKERS:
            raise UserError(f"--log {name} is not one of {', '.join(TRACKERS)}")
        installed(TRACKERS[name], f"--log {name}", name)


class Log:
    """log.jsonl: an object per line with "step" and "loss", "val" or "event"; also feeds the trackers of --log."""
    def __init__(self, folder, recipe=None, resumed_at=None):
        self.path, self.failed = folder / "log.jsonl", False
        self.sent = max((entry["step"] for entry in self.entries()), default=-1)  # trackers know the steps up to here
        if resumed_at is not None:
            self.forget(resumed_at)
        self.events = [entry for entry in self.entries() if "event" in entry]
        self.trackers = [*open_trackers(recipe, folder)] if recipe and recipe.log else []

    def entries(self):
        with suppress(FileNotFoundError), open(self.path, "rb") as lines:
            for line in lines:  # the last one of a killed run may be torn
                with suppress(Exception):
                    entry = json.loads(line)
                    sum(entry.get(name) or 0 for name in "tokens loss train_seconds".split())  # numbers
                    if isinstance(entry.get("step"), int):
                        yield entry

    def forget(self, step):
        """Drops entries after `step`, except events."""
        kept = [json.dumps(entry) + "\n" for entry in self.entries() if entry["step"] <= step or "event" in entry]
        write_text(self.path, "".join(kept))

    def write(self, **entry):
        entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # JSON has neither NaN nor infinity
        if entry in self.events:
            return  # a resumed run meets again what it met before
        if "event" in entry:
            self.events.append(entry)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * self.failed + json.dumps(entry) + "\n")  # ends a line that a full disk tore
            self.failed = False
        except OSError as error:  # a full disk costs lines of the log, not the run
            if not self.failed:
                tqdm.write(f"warning   {self.path} cannot be written ({error}); training continues", file=sys.stderr)
            self.failed = True
        parts = {f"{name}/{part}": v for name, of in entry.items() if isinstance(of, dict) for part, v in of.items()}
        numbers = {name: v for name, v in (entry | parts).items() if isinstance(v, (int, float))}
        for tracker in list(self.trackers if entry["step"] > self.sent else ()):
            try:
                tracker[0](entry["step"], numbers)
            except Exception as error:  # a service that is down must not end the run
                self.trackers.remove(tracker)
                tqdm.write(f"warning   a tracker of --log failed and gets no more: {error}", file=sys.stderr)

    def close(self):
        for _, finish in self.trackers:
            finish()


def open_trackers(recipe, folder):
    """Yields (write the numbers of a step, finish) for each tracker that --log names."""
    known = folder / "tracker-id"
    if not known.exists():  # unique: another run of this name is another one there
        known.write_text(f"{folder.name}-{os.urandom(4).hex()}", "utf-8")
    for name in recipe.log.split(","):
        module, run_id = installed(TRACKERS[name]), known.read_text("utf-8")
        if name == "tensorboard":
            board = module.SummaryWriter(str(folder / "tensorboard"))
            yield (lambda step, row, b=board: [b.add_scalar(k, v, step) for k, v in row.items()]), board.close
        else:
            same = {"id": run_id} if name == "wandb" else {}
            module.init(project="nanoplaybook", name=run_id, config=asdict(recipe), resume="allow", **same)
            yield (lambda step, numbers, m=module: m.log(numbers, step=step)), module.finish


def draw_log(folder):
    """The loss and held-out curves of a run as loss.png; None without matplotlib."""
    trained, judged = ([e for e in Log(folder).entries() if kind in e] for kind in ("loss", "val"))

    def paint(axes):
        left, right = axes
        left.plot([e["tokens"] for e in trained], [e["loss"] for e in trained], lw=0.8)
        left.set(title="training loss", xlabel="tokens", ylabel="nats per token")
        for source in judged[-1]["val"] if judged else ():
            right.plot([e["tokens"] for e in judged], [e["val"][source] for e in judged], marker=".", label=source)
        right.set(title="held-out text", xlabel="tokens", ylabel="bits per byte (lower is better)")
        right.legend()
        for panel in axes:
            panel.locator_params("x", nbins=6)
    return draw(folder / "loss.png", paint, columns=2, size=(11, 4))


# ---- our checkpoints ----------------------------------------------------------------------------------------------
@contextmanager
def _new_folder(place):
    """A folder to write into, beside its place; it gets its name at the end, and is removed if anything fails."""
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(place, ignore_errors=True)  # a damaged one
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_chat_format(source, folder, tokenizer, defaults={}):
    """Keeps a Hugging Face model's chat format beside what is trained from it; `defaults` fill what it lacks. The token
    that ends a turn in training joins the stops: a base model's files often name only the end of a text."""
    chat, last = ChatFormat(source, tokenizer), []
    if not (settings := defaults | chat.content("tokenizer_config.json")):
        return
    with suppress(UserError):  # a template that refuses this conversation
        ids, mask = chat.samples([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1]
        last = [id for id, trained in zip(ids, mask) if trained][-1:]
    write_json(folder / "tokenizer_config.json", settings | {
        "add_bos_token": bool(chat.opening), "chat_template": chat.template or defaults.get("chat_template"),
        "tokenizer_class": "PreTrainedTokenizerFast"})  # reads tokenizer.json as it is
    write_json(folder / "generation_config.json", {"pad_token_id": tokenizer.pad_id} | chat.content(
        "generation_config.json") | {"eos_token_id": sorted(chat.stop | set(last) & set(tokenizer.special.values()))})


def _write_checkpoint(place, config, weights, moments, state, tokenizer, chat_from):
    with _new_folder(place) as folder:
        torch.save(weights, folder / "model.pt")
        if moments:
            torch.save(moments, folder / "optimizer.pt")
        write_json(folder / "config.json", asdict(config))
        (folder / "training.json").write_text(state, "utf-8")
        tokenizer.save(folder)
        copy_chat_format(chat_from, folder, tokenizer)
        hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        for name in hashes:
            with open(folder / name, "rb+") as file:
                os.fsync(file.fileno())
        write_json(folder / "manifest.json", {"format": 2, "files": hashes})


def save_weights(model, tokenizer, out, chat_from):
    """Weights alone as a checkpoint folder in the chat format of the folder `chat_from`; training can start from it."""
    _write_checkpoint(Path(out), model.config, model.state_dict(), {}, '{"step": 0}', tokenizer, chat_from)


@dataclass
class Saver:
    """Writes a run's checkpoints and removes old ones. All processes call `save`, to gather a sharded model."""
    run_folder: str | Path
    tokenizer: Tokenizer
    keep: int = 3  # how many of the newest stay
    keep_every: int = 0  # multiples of it stay too
    keepers: tuple = ()  # and these steps
    leader: bool = True  # whether this is the process that writes
    pending: object = None  # the save that is being written

    def save(self, step, model, optimizer, state, must=False, protect=None):
        """Copies weights and moments to the host and writes them in a thread. Returns "" or one sentence about the save
        before this one, if that failed: training can continue without it. must: waits, and raises UserError if this
        save fails. protect: the step at which a running loss spike began; the newest checkpoint before it stays."""
        def host(tensors):
            if isinstance(tensors, dict):
                return {name: host(tensor) for name, tensor in tensors.items()}
            whole = tensors.full_tensor() if isinstance(tensors, DTensor) else tensors
            return whole.detach().to("cpu", copy=True) if self.leader else None
        trouble = self.finish()  # first: the host holds one copy only
        parts, moments = getattr(optimizer, "optimizers", [optimizer]), {}
        if any(part.state for part in parts):  # before the first update get_state_dict would make moments
            moments = host(get_state_dict(model, parts)[1]["state"])
        content = model.config, host(get_model_state_dict(model)), moments, json.dumps(state | {"step": step})
        if self.leader:
            self.pending = ThreadPoolExecutor(1).submit(self._write, step, protect or 0, *content)
        if must and (failed := self.finish()):
            raise UserError(failed + " and resume")
        return trouble

    def finish(self):
        """Waits for the save that is being written; "" or, if it failed, one sentence."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else ""

    def _write(self, step, protect, *content):
        folder = Path(self.run_folder, "checkpoints")
        try:
            for rest in folder.glob("*.partial"):  # of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            _write_checkpoint(folder / f"step-{step:08d}", *content, self.tokenizer, self.run_folder)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk by RuntimeError
            return f"a checkpoint could not be written ({' '.join(str(error).split())[:150]}); make room on the disk"
        found = sorted(at for path in folder.glob("step-????????") if (at := int(path.name[5:])) <= step)
        stay = {*found[-self.keep:], *[at for at in found if at < protect][-1:], *self.keepers}
        for at in found:
            if at not in stay and not (self.keep_every and at % self.keep_every == 0):
                gone = (folder / f"step-{at:08d}").rename(folder / f"{at}.partial")
                shutil.rmtree(gone, ignore_errors=True)
        return ""


def check_manifest(checkpoint):
    """The same folder; UserError unless every file has the sha256 that manifest.json names."""
    with reading(checkpoint):
        files = read_json(checkpoint / "manifest.json")["files"]
        for name in sorted({"model.pt", "config.json", "training.json", *files}):
            if file_sha256(checkpoint / name) != files[name]:
                raise UserError(f"{checkpoint / name} is not what was saved (its sha256 differs)")
    return checkpoint


def find_checkpoint(run, before=10**9):
    """A checkpoint as it is, or a run's last whole one from before a step; damaged ones are named and skipped."""
    if any(Path(run).glob("**/guard.json")):
        raise UserError(f"{run} is of this project's first version; export it with that and train the export")
    if Path(run, "manifest.json").exists():
        return check_manifest(Path(run))
    for checkpoint in sorted(Path(run).glob("checkpoints/step-????????"), reverse=True):
        try:
            if int(checkpoint.name[5:]) < before:
                return check_manifest(checkpoint)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
    raise UserError(f"{run} does not exist or holds no whole checkpoint; give a run or train one: python train.py")


def _shapes(tensors):
    return {k: _shapes(w) if isinstance(w, dict) else (w.shape, w.is_floating_point()) for k, w in tensors.items()}


def _load_tensors(path, like):
    """The tensors of a file; UserError unless names, shapes and kinds are those of `like`."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # its message advises to load the file without this protection
        raise UserError(f"{path} holds something other than tensors; it is not loaded") from None
    if _shapes(tensors) != _shapes(like):
        raise UserError(f"{path} is of a model of other sizes or of another optimizer; take back the flags that say so")
    return tensors


def load_checkpoint(folder, model, optimizer):
    """Fills model and optimizer and returns the saved state. All processes call it; the first reads and broadcasts."""
    parts, many = getattr(optimizer, "optimizers", [optimizer]), torch.distributed.is_initialized()
    model.zero_grad()
    with reading(folder := Path(folder)):
        state, trained = read_json(folder / "training.json"), (folder / "optimizer.pt").exists()
        state["step"] = int(state["step"])
        weights, moments = get_state_dict(model, parts)  # makes moments where there are none, to be filled
        if not many or torch.distributed.get_rank() == 0:
            weights = _load_tensors(folder / "model.pt", weights)
            if trained:
                moments["state"] = _load_tensors(folder / "optimizer.pt", moments["state"])
        options = StateDictOptions(full_state_dict=many, broadcast_from_rank0=many)
        set_model_state_dict(model, weights, options=options)
        if trained:
            set_optimizer_state_dict(model, parts, moments, options=options)
        for part in () if trained else parts:
            part.state.clear()
    return state


def is_hugging_face(folder):
    path = Path(folder) / "config.json"
    return path.exists() and "model_type" in read_json(path)


def load_config(folder):
    with reading(path := Path(folder) / "config.json"):
        saved = read_json(path)
        return config_from_hugging_face(saved) if "model_type" in saved else ModelConfig(**saved)


def from_pretrained(folder, dtype=torch.float32):
    """The model of a Hugging Face folder, a run (its newest whole checkpoint) or a checkpoint folder, on the CPU."""
    foreign = is_hugging_face(folder)
    folder = Path(folder) if foreign else find_checkpoint(folder)
    with reading(folder):
        with torch.device("meta"):
            model = GPT(load_config(folder))
        weights = (_read_hugging_face(folder, model, dtype) if foreign else
                   _load_tensors(folder / "model.pt", model.state_dict()))
        weights = {name: w if name.endswith(EXACT) else w.to(dtype) for name, w in weights.items()}
        model.load_state_dict(weights, assign=True)
    return model


# ---- Hugging Face's folders ---------------------------------------------------------------------------------------
# A class's name; fields of config.json with our names; ours that are implied; {ours: theirs}; {theirs: the one value
# that model.py computes}. A config is written as the first family that, read back, computes the same.
Family = namedtuple("Family", "name fields implied renamed fixed", defaults=({}, {}, {}))
_LATENT = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
           "hidden_act max_position_embeddings tie_word_embeddings rms_norm_eps initializer_range attention_bias ")
_SIZES = _LATENT + "head_dim "
_WINDOWS = _SIZES + "layer_types sliding_window "
_MOE = "num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef "
_DEEPSEEK = _LATENT + _MOE + ("q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_shared_experts "
                              "first_k_dense_replace routed_scaling_factor ")
_ROUTED = {"num_experts": "n_routed_experts"}
_LOCAL = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
_SLIDING = {"layer_types": ["sliding"]}
_YARN = {"yarn_" + name: name for name in "beta_fast beta_slow truncate mscale_all_dim".split()}
_OPTIONAL = [*_YARN, *("head_dim hidden_act initializer_range attention_bias mlp_bias q_lora_rank sliding_window "
                       "router_aux_loss_coef").split()]
FAMILIES = {
    "llama": Family("Llama", _SIZES + "mlp_bias", {"rope_theta": 10_000.0}),
    "qwen3": Family("Qwen3", _WINDOWS, {"qk_norm": True, "head_dim": 128}),
    "mistral": Family("Mistral", _SIZES + "sliding_window", _SLIDING, fixed={"attention_bias": False}),
    "smollm3": Family("SmolLM3", _WINDOWS + "mlp_bias no_rope_layer_interval",
                      {"no_rope_layer_interval": 4, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2", _SIZES, {"norm_position": "post", "qk_norm": True, "qk_norm_across_heads": True}),
    "qwen2": Family("Qwen2", _WINDOWS, {"attention_bias": True}),  # read; written as llama or smollm3
    "mixtral": Family("Mixtral", _SIZES + "num_experts_per_tok router_aux_loss_coef sliding_window",
                      _SLIDING, _LOCAL, {"attention_bias": False}),
    "qwen3_moe": Family("Qwen3Moe", _SIZES + _MOE + "num_experts", {"qk_norm": True}, {},
                        {"use_sliding_window": False}),
    "gpt_oss": Family("GptOss", _WINDOWS + "num_experts_per_tok swiglu_limit router_aux_loss_coef",
                      {"attention_sinks": True, "attention_bias": True, "mlp_bias": True, "head_dim": 64,
                       "swiglu_limit": 7.0, "layer_types": ["sliding", "full"]}, _LOCAL, {"hidden_act": "silu"}),
    "deepseek_v2": Family("DeepseekV2", _DEEPSEEK, {}, _ROUTED, {
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}),
    "deepseek_v3": Family("DeepseekV3", _DEEPSEEK + "n_group topk_group", {
        "scoring_func": "sigmoid", "router_aux_loss_coef": 0.0}, _ROUTED, {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    "qwen3_next": Family("Qwen3Next", _SIZES + _MOE + (
        "layer_types num_experts linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
        "linear_conv_kernel_dim partial_rotary_factor shared_expert_intermediate_size"), {"qk_norm": True,
        "attn_output_gate": True, "norm_zero_centered": True, "shared_expert_gate": True, "n_shared_experts": 1,
        "partial_rotary_factor": 0.25, "layer_types": ["linear"] * 3 + ["full"]}, {}, {"hidden_act": "silu"}),
}
FAMILIES["kimi_k2"] = FAMILIES["deepseek_v3"]


def config_from_hugging_face(hf):
    """config.json as a dictionary -> our config. Raises UserError for what model.py does not compute."""
    if (kind := hf["model_type"]) not in FAMILIES:
        raise UserError(f"the architecture {kind} is not one of {', '.join(FAMILIES)}")
    family, scaling = FAMILIES[kind], hf.get("rope_scaling") or {}  # the older name, still used to switch YaRN on
    seen = ({"mscale": 0, "num_experts": hf.get("num_local_experts")} | (hf.get("quantization_config") or {}) | hf
            | (hf.get("rope_parameters") or {}) | scaling)
    position = scaling.get("type") or seen.get("rope_type") or "default"
    fixed = {"quant_method": "mxfp4" if kind == "gpt_oss" else "fp8", "weight_block_size": [128, 128],
             "low_freq_factor": 1, "high_freq_factor": 4, "attention_factor": None, "rope_interleave": True,
             "mscale": seen.get("mscale_all_dim") or 0, **family.fixed}
    if not {"partial_rotary_factor", "kv_lora_rank"} & {*family.fields.split()}:
        fixed["partial_rotary_factor"] = 1
    if not hf.get("layer_types"):
        fixed |= {"use_sliding_window": False, "full_attention_interval": 4}
    if kind == "smollm3" and (turned := hf.get("no_rope_layers")):
        every = hf.get("no_rope_layer_interval", 4)
        fixed["no_rope_layers"] = [int(not every or (i + 1) % every > 0) for i in range(len(turned))]
    for key, value in fixed.items():
        if seen.get(key) not in (None, value):
            raise UserError(f"config.json has {key} = {seen[key]}, but {kind} is computed here only with {value}")
    values = {"tie_word_embeddings": False, "position": position.replace("default", "rope"), "layer_types": ["full"],
              "num_key_value_heads": hf["num_attention_heads"], **family.implied}
    names = {name: name for name in (*family.fields.split(), "rope_theta")} | family.renamed | _YARN
    for ours, theirs in names.items():
        found = seen.get(theirs)
        if found is not None and (found or ours not in ("num_experts", "kv_lora_rank")):
            values[ours] = found
        elif ours not in (*values, *_OPTIONAL):
            raise UserError(f"config.json lacks {theirs}, which a {kind} needs")
    if position != "default":
        values |= {"rope_factor": seen["factor"], "original_max_position_embeddings": seen.get(
            "original_max_position_embeddings") or values["max_position_embeddings"]}
    types = [name.removesuffix("_attention") for name in values["layer_types"]]
    if not values.get("sliding_window"):
        types = [name.replace("sliding", "full") for name in types]
    shortest = next(n for n in range(1, len(types) + 1) if (types[:n] * len(types))[:len(types)] == types)
    return ModelConfig(**values | {"layer_types": ",".join(types[:shortest])})


def _effective(c):
    """What a config computes: without the fields of training and those that change nothing here."""
    unused = "initializer initializer_range router_aux_loss_coef router_bias_update_rate router_z_loss_coef".split()
    unused += ["intermediate_size"] * (c.num_experts > 0 and not c.first_k_dense_replace)
    unused += ["num_key_value_heads"] * (c.kv_lora_rank > 0) + ["sliding_window"] * ("sliding" not in c.layer_types)
    layers, shared = range(c.num_hidden_layers), c.n_shared_experts * c.moe_intermediate_size
    return asdict(c) | dict.fromkeys(unused) | {"shared_expert_intermediate_size": 0,
        "n_shared_experts": (c.shared_expert_intermediate_size or shared) * (c.num_experts > 0),  # their width
        "layer_types": [c.layer_type(i) for i in layers], "no_rope_layer_interval": [c.uses_rope(i) for i in layers]}


def config_to_hugging_face(config):
    """Our config -> config.json as a dictionary. Raises UserError naming what no family there has."""
    wanted, lost = _effective(config), {}
    for kind in FAMILIES:
        hf = _write_config(config, kind)
        with suppress(UserError):  # a family of experts, for one, refuses to have none
            back = _effective(config_from_hugging_face(hf))
            lost[kind] = [f"{name} = {getattr(config, name)}" for name in wanted if wanted[name] != back[name]]
            if not lost[kind]:
                return hf
    kind = min(lost, key=lambda kind: len(lost[kind]))
    raise UserError(f"no Hugging Face architecture is {kind} with {', '.join(lost[kind])}; keep the run's checkpoint")


def _write_config(c, kind):
    family, wanted, sliding = FAMILIES[kind], _effective(c), "sliding" in c.layer_types
    shared = wanted["n_shared_experts"]
    values = asdict(c) | {
        "q_lora_rank": c.q_lora_rank or None, "sliding_window": c.sliding_window if sliding else None,
        "num_key_value_heads": c.num_attention_heads if c.kv_lora_rank else c.num_key_value_heads,
        "layer_types": [name + "_attention" for name in wanted["layer_types"]],
        "no_rope_layer_interval": c.no_rope_layer_interval or c.num_hidden_layers + 1,
        "shared_expert_intermediate_size": shared, "n_shared_experts": shared // (c.moe_intermediate_size or 1)}
    hf = {"model_type": kind, "architectures": [family.name + "ForCausalLM"]}
    hf |= {name: values[name] for name in family.fields.split()}
    hf |= {theirs: values[ours] for ours, theirs in family.renamed.items()} | family.fixed
    hf |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # no family's own
    hf |= {"use_sliding_window": sliding} if "layer_types" in hf else {}
    rope, scaling = {"rope_type": "default", "rope_theta": c.rope_theta}, None
    if c.position in ("llama3", "yarn"):
        scaling = rope = rope | {"rope_type": c.position, "factor": c.rope_factor,
                                 "original_max_position_embeddings": c.original_max_position_embeddings}
        rope |= ({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if c.position == "llama3" else
                 {theirs: values[ours] for ours, theirs in _YARN.items()} | {"mscale": c.yarn_mscale_all_dim})
    if kind == "qwen3_next":
        rope = rope | {"partial_rotary_factor": c.partial_rotary_factor}
    return hf | {"rope_parameters": rope, "rope_theta": c.rope_theta, "rope_scaling": scaling}  # transformers 5, 4, 4


_NAMES = {  # family: (ours, theirs)
    "gpt_oss": ((".mlp.gate.", ".mlp.router."),), "qwen3_next": ((".shared_experts.", ".shared_expert."),), "mixtral": (
        (".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2."))}


def their_tensors(weights, config, kind):
    """{name in the family: the view of our tensors that it is}. Our experts are stacked, theirs have a tensor each;
    gpt-oss stacks them too, [E, in, out], with gate and up alternating: its gate_up_proj is [E, C, M, 2] here."""
    found = {}
    for name, w in weights.items():
        stem, _, last = name.rpartition(".")
        if last == EXACT and config.scoring_func == "softmax" or kind == "qwen2" and name.endswith("o_proj.bias"):
            if w.any():
                raise UserError(f"no Hugging Face architecture has {name} here; keep the run's own checkpoint")
            continue
        parts = {name: w}
        if ".experts." in name and kind == "gpt_oss":
            w = w.unflatten(1, (2, -1)).transpose(1, 2) if "gate_up" in last else w  # [E, M, 2, C]; a bias [E, M, 2]
            parts = {name: w if last.endswith("_bias") else w.movedim(-1, 1)}
        elif ".experts." in name:
            halves = zip(("gate", "up"), w.chunk(2, 1)) if "gate_up" in last else [("down", w)]
            parts = {f"{stem}.{e}.{half}_proj.weight": part for half, stack in halves for e, part in enumerate(stack)}
        for theirs, part in parts.items():
            for before, after in _NAMES.get(kind, ()):
                theirs = theirs.replace(before, after)
            found[theirs] = part
    return found


def _mxfp4(blocks, scales):
    """gpt-oss' 4-bit weights, two a byte: blocks [E, rows, C/32, 16], scales [E, rows, C/32] -> [E, C, rows]."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((positive, -positive))[torch.stack((blocks & 15, blocks >> 4), -1).int()].flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).transpose(1, 2)


def _open_weights(folder):
    """{tensor: the open file that holds it}. Adapters and Mistral's own format may lie beside the model's files."""
    safe_open, index = installed("safetensors").safe_open, folder / "model.safetensors.index.json"
    files = {file.name: safe_open(file, framework="pt") for file in folder.glob("*.safetensors")
             if not file.name.startswith(("adapter", "consolidated"))}
    held = [(name, file) for file, opened in files.items() for name in opened.keys()]
    if index.exists():
        chosen = read_json(index)["weight_map"]
        if "model.safetensors" in files and "model.safetensors" not in chosen.values():
            raise UserError(f"{folder} has model.safetensors and an index of other files; remove the older of the two")
    elif len(chosen := dict(held)) < len(held):
        raise UserError(f"files of {folder} have tensors of the same name; remove what does not belong to the model")
    return {name: files[file] for name, file in chosen.items()}


def _read_hugging_face(folder, model, dtype):
    """The weights of a folder under our names, for a model without memory."""
    hf, where, config = read_json(folder / "config.json"), _open_weights(folder), model.config
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if sum(w.numel() for w in model.parameters()) > 2 * size:  # 4 bits each at least
        raise ValueError("config.json asks for more weights than its .safetensors files hold")
    weights = {name: torch.zeros(w.shape, dtype=torch.float32 if name.endswith(EXACT) else dtype)
               for name, w in model.state_dict().items()}
    views, end = their_tensors(weights, config, hf["model_type"]), config.num_hidden_layers
    head, first = "lm_head.weight", "model.embed_tokens.weight"
    for name, file in where.items():
        layer, tensor = re.match(r"model\.layers\.(\d+)\.", name), file.get_tensor(name)
        if (name.endswith(("rotary_emb.inv_freq", "_scales", "_scale_inv")) or name.startswith("mtp.")
                or layer and end <= int(layer[1]) < end + (hf.get("num_nextn_predict_layers") or 0)
                or name == head and config.tie_word_embeddings and torch.equal(tensor, where[first].get_tensor(first))):
            continue  # multi-token prediction is not computed here
        if (scales := name.removesuffix("_blocks") + "_scales") in where:
            name, tensor = name.removesuffix("_blocks"), _mxfp4(tensor, where[scales].get_tensor(scales))
        if (scales := name + "_scale_inv") in where:  # DeepSeek's FP8: a scale for each square of 128 x 128
            scale = where[scales].get_tensor(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensor = tensor.float() * scale[:len(tensor), :tensor.shape[1]]
        if "gate_up" in name:
            tensor = tensor.unflatten(-1, (-1, 2))
        if name not in views or tensor.shape != views[name].shape or not tensor.is_floating_point():
            raise ValueError(f"config.json asks for no {name} of {list(tensor.shape)} ({tensor.dtype})")
        views.pop(name).copy_(tensor)
    if views:
        raise ValueError(f"it lacks {min(views)} ({len(views)} tensors in all)")
    if (path := folder / "tokenizer.json").exists():
        spec, rows = read_json(path), config.vocab_size
        if max([len(spec["model"]["vocab"]), *(t["id"] + 1 for t in spec["added_tokens"])]) > rows:
            raise UserError(f"{path} has more tokens than the model has embedding rows, {rows:,}; take its own")
    return weights


@torch.no_grad()
def save_pretrained(model, folder, tokenizer_from=None):
    """Writes a new folder for transformers, with the tokenizer of `tokenizer_from`; returns what it checked."""
    safetensors = installed("safetensors.torch", package="safetensors")
    if (folder := Path(folder)).exists():
        raise UserError(f"{folder} is already there; give a new folder")
    chat = tokenizer_from and ChatFormat(tokenizer_from, Tokenizer.load(tokenizer_from))
    hf = config_to_hugging_face(model.config)
    tensors = their_tensors(model.state_dict(), model.config, hf["model_type"])
    with _new_folder(folder) as place:
        plain = {k: (w.flatten(-2) if "gate_up" in k else w).contiguous().clone() for k, w in tensors.items()}
        safetensors.save_file(plain, place / "model.safetensors", metadata={"format": "pt"})
        write_json(place / "config.json", hf | (_write_tokenizer(chat, place) if chat else {}))
        return _compare_with_transformers(model, place, chat)


def _write_tokenizer(chat, folder):
    """Lets transformers open texts, render chats and stop as a ChatFormat does; returns what config.json says of it."""
    tokenizer, bos_id = chat.tokenizer, chat.opening[0] if chat.opening else None
    ids = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id, "bos_token": bos_id}
    names = {role: tokenizer.decode([id]) for role, id in ids.items() if id is not None}
    template = CHAT_TEMPLATE if "<|im_start|>" in tokenizer.special else None
    copy_chat_format(chat.folder, folder, tokenizer, names | {"chat_template": template})
    path = tokenizer.save(folder)
    if bos := names.get("bos_token"):  # transformers ignores add_bos_token and obeys this
        parts = [{"SpecialToken": {"id": bos, "type_id": 0}}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB")]
        write_json(path, read_json(path) | {"post_processor": {
            "type": "TemplateProcessing", "single": parts[:2], "pair": parts,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}})
    return {f"{role}_id": id for role, id in ids.items()}


def _compare_with_transformers(model, folder, chat):
    """Loads the folder with transformers; UserError where its logits, in fp32, or its ids are others."""
    try:
        import transformers
    except ImportError:
        return "not checked: transformers is not installed (pip install transformers)"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    c, version, seeded = model.config, f"transformers {transformers.__version__}", torch.Generator().manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(c.vocab_size, (8, min(200, c.max_position_embeddings)), generator=seeded)
    ours, expected = model.eval()(tokens), theirs(tokens).logits
    # Rounding decides between experts that nearly tie, and changes the rest of a row: there one row of 8 has to agree.
    rows = (ours - expected).abs().amax((1, 2))
    worst = (rows.min() if c.num_experts else rows.max()).item()
    if not worst <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise UserError(f"{version} gives other logits for {folder} (difference {worst:.1e}); please report this")
    if chat:
        hf, messages = transformers.AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": "12 + 30?"}]
        wanted, found = [chat.text("a b")], [hf("a b")["input_ids"]]
        if hf.chat_template:
            wanted.append(chat.prompt(messages))
            found.append(hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if wanted != found:
            raise UserError(f"{version} reads the ids {found}, the run {wanted}; please report this")
    return f"{version} loads it; largest difference of a logit {worst:.1e}"


def main():
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        raise UserError("give a run and a new folder: python checkpoint.py export runs/laptop exported")
    source, folder = sys.argv[2:]
    print(f"{folder} is written; {save_pretrained(from_pretrained(source), folder, tokenizer_from=source)}")


if __name__ == "__main__":
    run(main)

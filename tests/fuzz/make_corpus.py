"""Write the seeds of the fuzz targets: small valid inputs, and the known bad kinds.

    python tests/fuzz/make_corpus.py

Other files in tests/fuzz/corpus are inputs that once were findings; they stay.
"""

import base64
import io
import json
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(Path(__file__).parent)]

import numpy as np
import soundfile
import torch
from gguf import GGUFWriter
from safetensors.numpy import save as save_arrays
from safetensors.torch import save

from checkpoints import TinyShape, build_tiny
from gguf_files import add, add_metadata, close, crispasr_tensors
from targets import CONTENT_TYPES

CORPUS = Path(__file__).parent / "corpus"
SHAPE = TinyShape(layers=1, depth_layers=1)


def write(target: str, name: str, data: bytes) -> None:
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(data)


def audio() -> None:
    sine = 0.5 * np.sin(np.arange(480) / 10)
    for name, form, subtype in (
        ("sine.wav", "WAV", "PCM_16"),
        ("float.wav", "WAV", "FLOAT"),
        ("adpcm.wav", "WAV", "IMA_ADPCM"),
        ("sine.flac", "FLAC", "PCM_16"),
        ("sine.ogg", "OGG", "VORBIS"),
        ("sine.mp3", "MP3", "MPEG_LAYER_III"),
        ("sine.aiff", "AIFF", "PCM_16"),
        ("sine.au", "AU", "ULAW"),
    ):
        file = io.BytesIO()
        soundfile.write(file, sine, 24_000, subtype, format=form)
        write("audio", name, file.getvalue())
    file = io.BytesIO()
    soundfile.write(file, np.stack([sine, -sine], axis=1), 48_000, "PCM_24", format="WAV")
    write("audio", "stereo.wav", file.getvalue())


def safetensors() -> None:
    tensors = build_tiny(SHAPE).tensors
    small = {name: t.flatten()[:2].contiguous() for name, t in list(tensors.items())[::9]}
    write("safetensors", "small", save(small))
    for name, shape, offsets in (
        ("overflow", (2**62, 8), (0, 8)),
        ("beyond", (2,), (0, 800)),
        ("empty", (0, 2**40), (0, 0)),
    ):
        header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        text = json.dumps(header).encode()
        write("safetensors", name, struct.pack("<Q", len(text)) + text + bytes(8))


def state_dict() -> None:
    """torch.save's files, and a pickle that makes much of little."""
    tensor = torch.ones(4)
    state = OrderedDict(a=tensor, b=tensor[1:].half(), c=torch.nn.Parameter(tensor[None]))
    for name, value in (("plain", state), ("trainer", {"model": state, "step": [1, 2.5, None]})):
        file = io.BytesIO()
        torch.save(value, file)
        write("state_dict", name, file.getvalue())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        call = b"cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."
        archive.writestr("archive/data.pkl", b"\x80\x02" + call)
    write("state_dict", "bytearray", file.getvalue())


def gguf() -> None:
    """A few of CrispASR's tensors, cut to few values, in several types; and headers alone."""
    tiny = build_tiny(SHAPE)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = GGUFWriter(str(path), "csm-tts")
        add_metadata(writer, tiny)
        writer.add_token_list(["a", "b", "ab", "<|begin_of_text|>", "<|end_of_text|>"])
        writer.add_token_merges(["a b"])
        tensors = list(crispasr_tensors(tiny).items())
        for name, tensor in tensors[::5]:
            add(writer, name, tensor.reshape(-1)[:2], "f16")
        wide = torch.randn(1, 256)
        for i, kind in enumerate(("f32", "q8_0", "q4_k")):
            add(writer, f"backbone.blk.{i}.ffn_up.weight", wide, kind)
        add(writer, "mimi.dec_tfm.layers.0.attn.qkv_w", torch.randn(3, 32), "q8_0")
        book = "mimi.quantizer.rvq_first.vq.layers.0._codebook.embedding"
        add(writer, book, torch.randn(2, 4), "f16")
        close(writer, path)
        write("gguf", "crispasr", path.read_bytes())
        writer = GGUFWriter(str(path), "csm")
        for name, tensor in list(tiny.tensors.items())[::9]:
            add(writer, name, tensor.reshape(-1)[:2], "f32")
        close(writer, path)
        write("gguf", "csm.rs", path.read_bytes())
    start = b"GGUF" + struct.pack("<I", 3)
    write("gguf", "counts", start + struct.pack("<QQ", 2**63, 2**63))
    strings = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**40)
    write("gguf", "strings", start + struct.pack("<QQ", 0, 1) + strings)
    huge = struct.pack("<Q", 1) + b"a" + struct.pack("<I4QIQ", 4, *(4 * [2**63]), 0, 0)
    write("gguf", "huge", start + struct.pack("<QQ", 1, 0) + huge)


def config_json() -> None:
    shapes = {name: list(t.shape) for name, t in build_tiny(SHAPE).tensors.items()}
    (Path(__file__).parent / "shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")
    config = build_tiny(SHAPE).config
    write("config_json", "hf", json.dumps(config).encode())
    flavors = {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}
    sizes = {"text_vocab_size": 128256, "audio_vocab_size": 2051, "audio_num_codebooks": 32}
    write("config_json", "original", json.dumps(flavors | sizes).encode())
    write("config_json", "layers", json.dumps(config | {"num_hidden_layers": 10**9}).encode())
    write("config_json", "deep", b'{"a":' * 2000)
    write("config_json", "twice", b'{"vocab_size": 1, "vocab_size": 2}')
    write("config_json", "infinite", b'{"rms_norm_eps": 1e400, "rope_theta": NaN}')


def adapter_config() -> None:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "lm_head"],
        "rank_pattern": {r"lm_.*": 1},
        "alpha_pattern": {"layers.0.self_attn.(q_proj|k_proj)": 8.5},
        "init_lora_weights": True,
    }
    changes = {
        "small": {},
        "dora": {"use_dora": True},
        "infinite": {"lora_alpha": 1e400},
        "huge": {"r": 10**30, "lora_alpha": 10**30},
        "expression": {"alpha_pattern": {"(.*)*(.*)*$": 1}},
        "many": {"rank_pattern": {str(i): 1 for i in range(1001)}},
    }
    for name, change in changes.items():
        write("adapter_config", name, json.dumps(settings | change).encode())


def adapter_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"lm_head": (67, 64, 1)}
    for part, (rows, columns) in {
        "backbone_model.layers.0": (96, 64),
        "depth_decoder.model.layers.0": (64, 48),
    }.items():
        shapes[f"{part}.self_attn.q_proj"] = (rows, columns, 2)
    tensors = {}
    for module, (rows, columns, rank) in shapes.items():
        for factor, shape in {"A": (rank, columns), "B": (rows, rank)}.items():
            name = f"base_model.model.{module}.lora_{factor}.weight"
            tensors[name] = torch.randn(shape, generator=generator).half()
    write("adapter_tensors", "small", save(tensors))
    name = next(iter(tensors))
    write("adapter_tensors", "nan", save(tensors | {name: tensors[name] * float("nan")}))
    write("adapter_tensors", "one factor", save({name: tensors[name]}))
    for name, shape in (("rank 0", (0, 64)), ("huge rank", (2**62, 64))):
        header = {"lm_head.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": (0, 0)}}
        text = json.dumps(header).encode()
        write("adapter_tensors", name, struct.pack("<Q", len(text)) + text)


def tokenizer_json() -> None:
    settings = json.loads(build_tiny(SHAPE).tokenizer.to_str())
    write("tokenizer_json", "tiny", json.dumps(settings).encode())
    pattern = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    small = settings | {"pre_tokenizer": split}
    small["model"] = settings["model"] | {"vocab": {"a": 0, "b": 1}, "merges": []}
    write("tokenizer_json", "backtracking", json.dumps(small).encode())
    lower = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    write("tokenizer_json", "small", json.dumps(small | {"normalizer": lower}).encode())


def context_json() -> None:
    entries = [
        {"speaker": 0, "text": "one", "audio": "a.wav"},
        {"speaker": 1, "text": "zwei", "codes": "a.npy"},
    ]
    write("context_json", "both", json.dumps(entries).encode())
    write("context_json", "device", b'[{"speaker": 0, "text": "x", "codes": "/dev/zero"}]')
    write("context_json", "surrogate", b'[{"speaker": 0, "text": "\\ud800", "codes": "a.npy"}]')
    write("context_json", "zero byte", b'[{"speaker": 0, "text": "x", "audio": "\\u0000"}]')


def context_field() -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(2400)
    audio = {}
    for name, form, subtype in (
        ("WAV", "WAV", "ULAW"),
        ("FLAC", "FLAC", "PCM_S8"),
        ("OGG", "OGG", "VORBIS"),
        ("MP3", "MP3", "MPEG_LAYER_III"),
    ):
        file = io.BytesIO()
        soundfile.write(file, noise, 16_000, subtype, format=form)
        audio[name] = base64.b64encode(file.getvalue()).decode()
    turn = {"speaker": 1, "text": "eins"}
    codes = [[1, 2, 3, 4], [0, 0, 0, 0]]
    contexts = {name: [turn | {"audio": text}] for name, text in audio.items()} | {
        "codes": [turn | {"codes": codes}],
        "url": [turn | {"audio": f"data:audio/wav;base64,{audio['WAV']}"}],
        "ragged": [turn | {"codes": [*codes, [1]]}],
        "bool": [turn | {"codes": [[True, 0, 0, 0]]}],
        "big": [turn | {"codes": [[10**40, 0, 0, 0]]}],
        "not base64": [turn | {"audio": "ä"}],
    }
    for name, context in contexts.items():
        write("context_field", name, json.dumps(context).encode())
    write("context_field", "deep", b'[{"speaker": ' + b"[" * 900)


def codes_npy() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((2, SHAPE.num_codebooks), np.int64))
    data = file.getvalue()
    write("codes_npy", "codes.npy", data)
    write("codes_npy", "huge.npy", data.replace(b"(2, 4), }", b"(999999999999, 4)}"))
    write("codes_npy", "object.npy", data.replace(b"<i8", b"|O8"))


def voice_file() -> None:
    info = {
        "format": 1,
        "name": "alice",
        "speaker": 0,
        "created": 1,
        "num_codebooks": 4,
        "audio_vocab_size": 67,
        "frame_s": 0.08,
        "sample_rate_hz": 24_000,
        "segments": [{"transcript": "Hi.", "level_dbfs": -20.5}],
    }
    tensors = {"codes.0": np.ones((2, 4), np.int16), "preview": np.zeros(3, np.int16)}
    for name, change in (
        ("small", {}),
        ("other format", {"format": 2}),
        ("two segments", {"segments": info["segments"] * 2}),
        ("codes beyond", {"audio_vocab_size": 1}),
        ("surrogate", {"segments": [{"transcript": "\ud800"}]}),
    ):
        metadata = {"voxkern_voice": json.dumps(info | change)}
        write("voice_file", name, save_arrays(tensors, metadata))
    write("voice_file", "plain", save_arrays(tensors))


def voice_upload() -> None:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(4000)
    soundfile.write(file, noise, 8_000, "ULAW", format="WAV")
    wav, text = file.getvalue(), base64.b64encode(file.getvalue()).decode()
    for name, audio in (("JSON", text), ("url", f"data:audio/wav;base64,{text}"), ("bad", "ä")):
        recording = {"audio": audio, "transcript": "Hi."}
        body = json.dumps({"name": "alice", "speaker": 1, "recordings": [recording]})
        write("voice_upload", name, b"\x00" + body.encode())
    part = b'--b\r\nContent-Disposition: form-data; name="'
    form = part + b'name"\r\n\r\nalice\r\n' + part + b'transcript"\r\n\r\nHi.\r\n'
    form += part + b'audio"; filename="a.wav"\r\n\r\n' + wav + b"\r\n--b--\r\n"
    write("voice_upload", "form", b"\x02" + form)


def http_body() -> None:
    fields = {"text": "Hello.", "speaker": 1, "temperature": 0.5, "seed": 7, "max_frames": 3}
    form = "&".join(f"{name}={value}" for name, value in fields.items())
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    bodies = [json.dumps(fields), form, f"{parts}--b--\r\n", parts, "Hello.", '{"text": "x"}']
    for i, (kind, body) in enumerate(zip(CONTENT_TYPES, bodies, strict=True)):
        name = kind.partition(";")[0].replace("/", " ") or "none"
        write("http_body", f"{i} {name}", bytes([i]) + body.encode())
    write(
        "http_body", "file", b'\x02--b\r\nContent-Disposition: form-data; name="text"; filename="'
    )
    write("http_body", "surrogate", b'\x00{"text": "\\ud800", "seed": 1e400}')


def text() -> None:
    letter = (
        "Dr. J. Smith paid $3,000.50 on 12/25/2024 at 5:30pm, e.g. to the U.S. No. 5... "
        '"Is it 50 °C?" he said. Call +1 (555) 123-4567, or a@b.com! 2½ km/h, Henry VIII.'
    )
    page = (
        "# Title\r\n\r\n- [x](https://example.com/a)\n1. **1998-2003** 😀[1]\n\n"
        "| a | b |\n|---|---|\n```py\nx\n```\n你好。<b>&amp;</b>"
    )
    write("text", "letter", letter.encode())
    write("text", "page", page.encode())


if __name__ == "__main__":
    for make in (
        audio,
        safetensors,
        state_dict,
        gguf,
        config_json,
        adapter_config,
        adapter_tensors,
        tokenizer_json,
        context_json,
        context_field,
        codes_npy,
        voice_file,
        voice_upload,
        http_body,
        text,
    ):
        make()
    size = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    print(f"{size} bytes in {CORPUS}")

"""PyTorch's and PEFT's side of benches/gpu.rs: `gpu.py CASE... [--tiny]`, cases deit and bone.

Prints a line of JSON for each case: {"case", "ms", "tokens_per_s", "peak_bytes"} and maybe a "note", or {"case",
"missing"} where a library or a GPU is missing. `deit` is DeiT-S in training under bf16 autocast, compiled, AdamW fused;
its tokens are images. `bone` is MiSS with init_weights="bat" on a random Llama of TinyLlama's shape in bf16, without
checkpointing.
"""
import importlib.util, json, os, sys, time, traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What libraries print is not for the other side.
protocol, sys.stdout = sys.stdout, sys.stderr
tiny = "--tiny" in sys.argv
cases = [arg for arg in sys.argv[1:] if not arg.startswith("--")] or ["deit", "bone"]
needs = {"deit": ["torch"], "bone": ["torch", "transformers", "peft"]}


def say(**figures):
    print(json.dumps(figures), file=protocol, flush=True)


def deit():
    import torch
    import torch.nn.functional as F
    from torch import nn

    width, layers, heads, size, batch, classes = (32, 2, 2, 32, 2, 10) if tiny else (384, 12, 6, 224, 128, 1000)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.between = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(self.before(x)).view(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(o.transpose(1, 2).reshape(b, n, width))
            return x + self.down(F.gelu(self.up(self.between(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, width, 16, 16)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2 + 1, width))
            self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
            self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    model = Model().cuda().train()
    x, y = torch.randn(batch, 3, size, size, device="cuda"), torch.arange(batch, device="cuda") % classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    note = {}
    run = torch.compile(model)
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(x).float().sum().backward()
    except Exception as error:  # Compiling needs a C compiler and more.
        traceback.print_exc()
        run, note = model, {"note": f"not compiled: {type(error).__name__}"}
    optimizer.zero_grad(set_to_none=True)
    return lambda: F.cross_entropy(run(x).float(), y), optimizer, batch, note


def bone():
    import torch
    import torch.nn.functional as F
    from peft import MissConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    if tiny:
        batch, length, vocab, rank, sizes = 2, 16, 64, 8, (32, 64, 2, 4, 2)
    else:
        batch, length, vocab, rank, sizes = 4, 512, 32000, 64, (2048, 5632, 22, 32, 4)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=length, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, **dict(zip(names, sizes)))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    miss = MissConfig(r=rank, init_weights="bat", target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, miss).cuda().train()
    count = batch * length
    ids = (torch.arange(count, device="cuda") * 7919 % vocab).view(batch, length)
    following = torch.arange(1, count + 1, device="cuda") * 7919 % vocab
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)

    def loss():
        return F.cross_entropy(model(ids, use_cache=False).logits.view(count, -1).float(), following)

    return loss, optimizer, count, {}


def timed(case):
    import torch

    loss, optimizer, count, note = {"deit": deit, "bone": bone}[case]()

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    # What compiling tried out is not what a step takes.
    torch.cuda.reset_peak_memory_stats()
    turns = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        turns.append((time.perf_counter() - start) / 3)
    seconds = sorted(turns)[len(turns) // 2]
    say(case=case, ms=1e3 * seconds, tokens_per_s=count / seconds, peak_bytes=torch.cuda.max_memory_allocated(),
        **note)


for case in cases:
    missing = [name for name in needs[case] if importlib.util.find_spec(name) is None]
    if not missing:
        import torch
        if not torch.cuda.is_available():
            missing = ["a GPU that PyTorch sees"]
    if missing:
        say(case=case, missing=", ".join(missing))
    else:
        timed(case)

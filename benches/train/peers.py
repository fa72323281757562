"""The peers' side of `cargo bench --bench train`: a case by name, a step for every line that says go.

Prints `ready KIB` (memory before the first step), then `MS KIB` (time of the step, peak memory) for each line read.
"""
import os, resource, sys, time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F

# What libraries print is not for the other side.
protocol, sys.stdout = sys.stdout, sys.stderr
case, threads, data = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(threads)
torch.manual_seed(0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
auto = case.endswith("-bf16")
name = case.removesuffix("-bf16")


def vision(model, batch, channels, size, classes):
    x, y = torch.randn(batch, channels, size, size), torch.arange(batch) % classes
    return model, lambda: F.cross_entropy(model(x), y), True


def language(model, batch, length, vocab):
    ids = (torch.arange(batch * length) * 7919 % vocab).view(batch, length)
    following = (torch.arange(1, batch * length + 1) * 7919 % vocab)
    return model, lambda: F.cross_entropy(model(ids, use_cache=False).logits.view(batch * length, -1).float(), following), True


def llama(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, rms_norm_eps=1e-5, **sizes))


def adapted(model, method, rank):
    from peft import LoraConfig, MissConfig, get_peft_model
    if method == "lora":
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        init = "bat" if method == "bone" else True
        config = MissConfig(r=rank, init_weights=init, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def inference(model, batch, channels, size, int8):
    """A forward pass, and the same in onnxruntime with weights and activations quantized dynamically to 8 bits."""
    model.eval()
    x = torch.randn(batch, channels, size, size)
    if not int8:
        return lambda: model(x)
    import tempfile
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = os.path.join(folder, "plain.onnx"), os.path.join(folder, "int8.onnx")
        torch.onnx.export(model, (x,), plain, dynamo=True, verbose=False)
        quantize_dynamic(plain, packed, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = ort.InferenceSession(packed, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def fashion():
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(28, 4, 1, 10, embed_dim=96, depth=6, num_heads=4, mlp_ratio=2)


if name.startswith("infer-"):
    import timm
    int8 = name.endswith("-int8")
    parts = name.removesuffix("-int8").split("-")
    batch = int(parts[-1])
    with torch.no_grad():
        if parts[1] == "deit":
            run = inference(timm.create_model("deit_tiny_patch16_224"), batch, 3, 224, int8)
        else:
            run = inference(fashion(), batch, 1, 28, int8)
        print("ready", peak(), file=protocol, flush=True)
        for line in sys.stdin:
            run()
            start = time.perf_counter()
            for _ in range(5):
                run()
            print((time.perf_counter() - start) * 1e3 / 5, peak(), file=protocol, flush=True)
    sys.exit(0)
elif name == "deit-tiny":
    import timm
    model, loss, fused = vision(timm.create_model("deit_tiny_patch16_224"), 8, 3, 224, 1000)
elif name == "vit-fashion":
    model, loss, fused = vision(fashion(), 100, 1, 28, 10)
elif name == "llama-15m":
    sizes = dict(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                 num_key_value_heads=6, max_position_embeddings=256)
    model, loss, fused = language(llama(**sizes), 4, 256, 32000)
elif name.startswith("smol-"):
    _, method, rank = name.split("-")
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3)
    model, loss, fused = language(adapted(llama(**sizes), method, int(rank)), 1, 256, 49152)
elif name.startswith("stories-"):
    from transformers import AutoModelForCausalLM
    _, method, rank = name.split("-")
    model = AutoModelForCausalLM.from_pretrained(os.path.join(data, "models/stories260K-hf"), dtype=torch.float32)
    if method != "full":
        model = adapted(model, method, int(rank))
    model, loss, fused = language(model, 8, 256, 512)
else:
    sys.exit(f"no case {case}")

model.train()
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=fused)
print("ready", peak(), file=protocol, flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=auto):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print((time.perf_counter() - start) * 1e3, peak(), file=protocol, flush=True)

"""The names of the network that SDXL was published with, which kohya's trainer writes."""


def sgm(name: str, depth: int) -> str:
    """What the network that SDXL was published with calls a layer of diffusers' UNet of `depth` layers a block."""
    top = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
           "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
           "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
    if name in top:
        return top[name]
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    where, *rest = name.split(".")
    block = 0 if where == "mid_block" else int(rest.pop(0))
    kind, index, last = rest[0], int(rest[1]), ".".join(rest[2:])
    last = inside.get(last, last) if kind == "resnets" else last
    if where == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{last}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (depth + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * (depth + 1) + depth}.2.conv"
    number = block * (depth + 1) + index + (1 if where == "down_blocks" else 0)
    way = "input" if where == "down_blocks" else "output"
    return f"{way}_blocks.{number}.{int(kind == 'attentions')}.{last}"

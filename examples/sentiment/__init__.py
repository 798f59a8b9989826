"""The demonstration: a pretrained sentence encoder learns human sentiment ratings, with LoRA and with LoRA-Dash.

    loradash finetune --out runs/demo        # or, without the command: python examples/sentiment --out runs/demo

Run by its folder, its files import each other as plain modules. Needs `pip install loradash-kernels[demo]`.
"""

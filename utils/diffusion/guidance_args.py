"""Flags of guidance. This module imports neither torch nor diffusers, so that ``--help`` is fast."""

from ..args import Parser, real


# fmt: off
def add_guidance_arguments(parser: Parser, group) -> None:
    """Add the flags of guidance by a colour or a sentence."""
    group.add_argument("--guidance_color", metavar="COLOR", help="target colour of samples: a name or #rrggbb")
    group.add_argument("--guidance_prompt", metavar="TEXT", help="description of the target, compared with samples by CLIP")
    group.add_argument("--clip_model_name_or_path", default="openai/clip-vit-base-patch32", help="CLIP model for --guidance_prompt")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="guidance strength. For a colour or a sentence, 0 is no guidance. For a colour, 1 reaches it. For a sentence, use 10 to 1000. For classes or a condition, 1 is the conditional model and 0 the unconditional one")
    group.add_argument("--guidance_mode", choices=("direct", "net"), default="direct", help="gradient with respect to the predicted image, or through the UNet")
    parser.checks.append(_check)


def _check(parser: Parser, args) -> None:
    """Refuse two targets at once, unknown colours, and a mode without a target."""
    from PIL import ImageColor

    if args.guidance_color:
        try:
            ImageColor.getrgb(args.guidance_color)
        except ValueError:
            parser.error(f"--guidance_color {args.guidance_color}: there is no such colour. Expected a name such as teal, or #rrggbb")
    if args.guidance_color and args.guidance_prompt:
        parser.error("--guidance_color and --guidance_prompt exclude each other. Give one of them")
    if args.guidance_mode == "net" and not (args.guidance_color or args.guidance_prompt):
        parser.error("--guidance_mode net needs --guidance_color or --guidance_prompt")
# fmt: on

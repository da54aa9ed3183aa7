"""Flags that steer samples, of the scripts that can; light enough to be parsed at once."""

from ..args import Parser, real


# fmt: off
def add_guidance_arguments(parser: Parser, group) -> None:
    """Add the flags that say what samples are steered towards."""
    group.add_argument("--guidance_color", metavar="COLOR", help="steer samples towards a colour: a name or #rrggbb")
    group.add_argument("--guidance_prompt", metavar="TEXT", help="steer samples towards a sentence, with CLIP")
    group.add_argument("--clip_model_name_or_path", default="openai/clip-vit-base-patch32", help="CLIP model for --guidance_prompt")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="how firmly: 0 not at all, 1 all the way for a colour; sentences want more, 10 to 1000; of classes 1 is the model as it is")
    group.add_argument("--guidance_mode", choices=("direct", "net"), default="direct", help="gradient with respect to the predicted image, or through the UNet")
    parser.checks.append(_check)


def _check(parser: Parser, args) -> None:
    """Refuse two aims at once, and what is no colour."""
    from PIL import ImageColor

    if args.guidance_color:
        try:
            ImageColor.getrgb(args.guidance_color)
        except ValueError:
            parser.error(f"--guidance_color {args.guidance_color}: no such colour; expected a name such as teal, or #rrggbb")
    if args.guidance_color and args.guidance_prompt:
        parser.error("--guidance_color and --guidance_prompt exclude each other; give one")
    if args.guidance_mode == "net" and not (args.guidance_color or args.guidance_prompt):
        parser.error("--guidance_mode net needs --guidance_color or --guidance_prompt")
# fmt: on

"""Jinja2 templates of the package: every value is escaped, unless the template itself marks it as safe."""

import jinja2


def template(package: str, name: str) -> jinja2.Template:
    """The template file `name` beside the modules of `package`. A name that the caller does not pass raises UndefinedError."""
    loader = jinja2.PackageLoader(package, "")
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, **options).get_template(name)

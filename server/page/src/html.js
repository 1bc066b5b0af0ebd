// Markup as tagged templates: what is interpolated is always text or an attribute's value, never markup.

import { h } from "preact";
import htm from "htm";

export const html = htm.bind(h);

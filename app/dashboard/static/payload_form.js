// A form for a payload, made from the function's JSON Schema. It reads JSON text, so numbers stay as they were typed.

import { Mistake } from "./api.js";
import { el } from "./elements.js";

const DEEPEST = 3;

/** Follow the `$ref`s of a schema. Returns the schema without null, and whether null is allowed, too. */
function resolve(schema, root) {
  for (let steps = 0; schema.$ref?.startsWith("#/") && steps < 20; steps += 1) {
    const { $ref, ...own } = schema;
    let found = root;
    for (const part of $ref.slice(2).split("/")) found = found?.[part.replace(/~1/g, "/").replace(/~0/g, "~")];
    schema = { ...found, ...own };
  }
  const choices = schema.anyOf ?? [];
  const others = choices.filter((each) => each.type !== "null");
  if (others.length === 1 && others.length < choices.length) {
    const { anyOf, ...own } = schema;
    const inner = resolve(others[0], root);
    return { schema: { ...inner.schema, ...own }, isNullable: true };
  }
  return { schema, isNullable: false };
}

/** Whether the form can have fields for this schema. If not, the person writes JSON. */
export function hasFields(schema) {
  const found = resolve(schema, schema).schema;
  return found.type === "object" && Object.keys(found.properties ?? {}).length > 0;
}

let numbers = 0;

// Each of these makes the input of one kind of schema: its element, a hint about its kind, and `read`, which returns JSON
// text, or null to leave the member out, and throws a Mistake if the text is not valid

function choiceInput(schema, values, common, isRequired) {
  const input = el("select", { ...common, placeholder: null },
    isRequired ? null : el("option", { value: "" }, "–"),
    ...values.map((value) => el("option", { value: JSON.stringify(value) }, String(value))));
  if (schema.default !== undefined && schema.default !== null) input.value = JSON.stringify(schema.default);
  return { input, kind: "", read: () => input.value || null };
}

function numberInput(schema, common, isRequired) {
  const least = schema.minimum ?? schema.exclusiveMinimum, most = schema.maximum ?? schema.exclusiveMaximum;
  const kind = [schema.type, least !== undefined ? `from ${least}` : "", most !== undefined ? `to ${most}` : ""]
    .filter(Boolean).join(" ");
  const input = el("input", { ...common, inputmode: schema.type === "integer" ? "numeric" : "decimal" });
  const read = () => {
    const text = input.value.trim();
    if (!text && !isRequired) return null;
    if (!/^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/.test(text)) throw new Mistake("must be a number");
    return text;
  };
  return { input, kind, read };
}

function textInput(schema, common, isRequired) {
  const input = el("textarea", { ...common, rows: schema.maxLength <= 100 || schema.format ? "1" : "2" });
  const read = () => (input.value === "" && !isRequired ? null : JSON.stringify(input.value));
  return { input, kind: schema.format ?? "", read };
}

function jsonInput(common, isRequired) {
  const input = el("textarea", { ...common, rows: "2" });
  const read = () => {
    if (input.value.trim() === "" && !isRequired) return null;
    try {
      JSON.parse(input.value);
    } catch {
      throw new Mistake("must be JSON");
    }
    return input.value;
  };
  return { input, kind: "JSON", read };
}

function makeInput(schema, common, isRequired) {
  const choices = schema.enum ?? (schema.const !== undefined ? [schema.const] : null);
  if (choices !== null) return choiceInput(schema, choices, common, isRequired);
  if (schema.type === "boolean") return choiceInput(schema, [true, false], common, isRequired);
  if (schema.type === "integer" || schema.type === "number") return numberInput(schema, common, isRequired);
  return schema.type === "string" ? textInput(schema, common, isRequired) : jsonInput(common, isRequired);
}

/** Make a field, or a group of fields: its element and `read`. Adds each field to `fields`. */
function makeField(name, given, root, path, isRequired, depth, fields) {
  const { schema, isNullable } = resolve(given, root);
  if (schema.type === "object" && schema.properties && depth < DEEPEST && !isNullable) {
    return makeGroup(name, schema, root, path, isRequired, depth, fields);
  }
  numbers += 1;
  const id = `field-${numbers}`;
  const hint = schema.description ?? given.description ?? "";
  const error = el("p", { class: "error", id: `${id}-error` });
  const common = {
    id, "aria-describedby": `${id}-hint ${id}-error`, "aria-required": isRequired ? "true" : null, spellcheck: "false",
    placeholder: schema.default !== undefined && schema.default !== null ? String(schema.default) : null,
  };
  const { input, kind, read } = makeInput(schema, common, isRequired);
  const label = el("label", { for: id }, name, isRequired ? el("span", { class: "hint" }, " (required)") : null);
  const about = el("p", { class: "hint", id: `${id}-hint` }, [hint, kind].filter(Boolean).join("; "));
  const field = {
    path,
    read() {
      field.complain("");
      try {
        return read();
      } catch (wrong) {
        field.complain(wrong.message);
        throw wrong;
      }
    },
    complain(text) {
      error.textContent = text;
      if (text) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    },
    focus: () => input.focus(),
    element: el("div", { class: "field" }, label, input, about, error),
  };
  fields.push(field);
  return field;
}

function makeGroup(name, schema, root, path, isRequired, depth, fields) {
  const required = new Set(schema.required ?? []);
  const members = Object.entries(schema.properties).map(([each, inner]) => [
    each, makeField(each, inner, root, [...path, each], required.has(each), depth + 1, fields),
  ]);
  const read = () => {
    const parts = [];
    let wrong = null;
    for (const [each, field] of members) {
      try {
        const text = field.read();
        if (text !== null) parts.push(`${JSON.stringify(each)}: ${text}`);
      } catch (error) {
        wrong ??= error;
      }
    }
    if (wrong) throw wrong;
    return parts.length || isRequired ? `{${parts.join(", ")}}` : null;
  };
  const elements = members.map(([, field]) => field.element);
  return { read, element: depth ? el("fieldset", {}, el("legend", {}, name), ...elements) : el("div", {}, ...elements) };
}

/** Make the form of a schema: its element, `read`, and `complain`, which shows an error of the service at its field. */
export function makeForm(schema) {
  const fields = [];
  const { element, read } = makeGroup("", resolve(schema, schema).schema, schema, [], true, 0, fields);
  return {
    element,
    read,
    /** Show an error at the field with this path. Returns false if there is no such field. */
    complain(path, text) {
      const field = fields.find((each) => each.path.join("\0") === path.join("\0"));
      field?.complain(text);
      return field !== undefined;
    },
    /** Focus the first field with an error. */
    focus: () => element.querySelector("[aria-invalid]")?.focus(),
  };
}

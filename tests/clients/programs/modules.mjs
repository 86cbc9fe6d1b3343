// Modules of these programs are found in CLIENT_MODULES, not beside them.
import { registerHooks } from "node:module";
import { pathToFileURL } from "node:url";

const here = new URL(".", import.meta.url).href;
const home = pathToFileURL(`${process.env.CLIENT_MODULES}/`).href;
registerHooks({
  resolve(specifier, context, next) {
    const ours = context.parentURL?.startsWith(here) && !/^(node:|\.|\/|file:)/.test(specifier);
    return next(specifier, ours ? { ...context, parentURL: home } : context);
  },
});

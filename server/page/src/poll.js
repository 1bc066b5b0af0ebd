// Ask again and again while a component is shown: one question at a time, none while the tab is hidden, at once when
// the server is back.

import { useEffect, useRef } from "preact/hooks";
import { reconnections } from "./api.js";

export function usePoll(ask, seconds, deps = []) {
  const latest = useRef(ask);
  latest.current = ask;
  const again = useRef(() => {});
  useEffect(() => {
    let timer;
    let alive = true;
    let asking = false;
    const tick = async () => {
      clearTimeout(timer);
      if (asking) return;
      asking = true;
      if (!document.hidden) await latest.current(() => alive).catch(() => {});
      asking = false;
      if (alive) timer = setTimeout(tick, seconds * 1000);
    };
    again.current = tick;
    tick();
    document.addEventListener("visibilitychange", tick);
    return () => {
      alive = false;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", tick);
    };
  }, [seconds, reconnections.value, ...deps]);
  return () => again.current();
}

// The viewer's words, in the languages of `locales/`.

const TEXTS = {
  en: {
    title: "Routes: where each subject went",
    map: "Map of the routes. Arrow keys move the marker.",
    picture: "Picture",
    step: "Step",
    block: "Block",
    all: "all blocks, majority",
    of: (number, count) => `${number} of ${count}`,
    subjects: "Subjects",
    background: "background",
    inactive: "off at this step",
    nothing: "No routes were recorded here.",
    hint: "Point at the map to see who is where.",
    lost: "The server no longer has this run's routes: queue the graph again.",
  },
  zh: {
    title: "路由：每个主体的位置",
    map: "路由图。用方向键移动标记。",
    picture: "图像",
    step: "步数",
    block: "层",
    all: "所有层（多数）",
    of: (number, count) => `${number} / ${count}`,
    subjects: "主体",
    background: "背景",
    inactive: "此步未启用",
    nothing: "此处没有记录路由。",
    hint: "将鼠标移到图上查看各区域。",
    lost: "服务器上已没有这次运行的路由：请重新执行工作流。",
  },
};

/** Texts of a language as the editor names it ("en", "zh", "zh-TW"); English for all others. */
export function textsFor(language) {
  return TEXTS[String(language ?? "en").split("-")[0]] ?? TEXTS.en;
}

"""Texts of several languages for the tests of the rules, written for them."""
# ruff: noqa: E501 - letters of other alphabets are meant

ENGLISH = (
    "The harbour master wrote down the name of every ship that came into the bay that spring. She had a good view from her window, and the fishermen "
    "knew that she would wave to them when the tide was right. Some of them had been at sea for a week with nothing but bread and salted fish to eat. "
    "They sold their catch to the people of the town before the sun was high. In the afternoon the children ran down to the water and looked for "
    "shells. Nobody remembered a winter that had been so long, or a summer for which they had waited with so much hope."
)
FINNISH = (
    "Satamamestari kirjoitti muistiin jokaisen laivan nimen, joka saapui lahdelle sinä keväänä. Hänen ikkunastaan oli hyvä näköala, ja kalastajat "
    "tiesivät, että hän vilkuttaisi heille, kun vuorovesi oli sopiva. Jotkut heistä olivat olleet merellä viikon eikä heillä ollut muuta syötävää "
    "kuin leipää ja suolakalaa. He myivät saaliinsa kaupungin asukkaille ennen kuin aurinko oli korkealla. Iltapäivällä lapset juoksivat rantaan "
    "etsimään simpukoita. Kukaan ei muistanut yhtä pitkää talvea, eikä kesää, jota olisi odotettu niin toiveikkaasti."
)
GERMAN = (
    "Die Hafenmeisterin schrieb in jenem Frühjahr den Namen jedes Schiffes auf, das in die Bucht kam. Sie hatte von ihrem Fenster eine gute Aussicht, "
    "und die Fischer wussten, dass sie ihnen winken würde, wenn die Flut günstig war. Manche von ihnen waren eine Woche auf See gewesen und hatten "
    "nichts als Brot und gesalzenen Fisch gegessen. Sie verkauften ihren Fang an die Leute der Stadt, bevor die Sonne hoch stand. Am Nachmittag liefen "
    "die Kinder zum Wasser und suchten Muscheln. Niemand erinnerte sich an einen Winter, der so lang gewesen war."
)
RUSSIAN = (
    "Той весной начальница порта записывала название каждого корабля, который входил в бухту. Из её окна открывался хороший вид, и рыбаки знали, что "
    "она помашет им рукой, когда начнётся прилив. Некоторые из них были в море целую неделю и ели только хлеб и солёную рыбу. Они продавали улов жителям "
    "города, пока солнце ещё не стояло высоко. После полудня дети бежали к воде и искали ракушки. Никто не помнил такой долгой зимы."
)
CHINESE = (
    "那年春天,港务长记下了每一艘驶入海湾的船的名字。从她的窗口望出去,景色很好,渔民们都知道,潮水合适的时候她会向他们挥手。有些人已经在海上漂了一个星期,"
    "除了面包和咸鱼什么也没吃。太阳还没有升高,他们就把捕到的鱼卖给了镇上的居民。下午,孩子们跑到水边去找贝壳。没有人记得有过这样漫长的冬天,"
    "也没有人记得有哪个夏天曾让大家如此期待。傍晚时分,老人们坐在码头上,谈论着从前的风浪和再也没有回来的朋友。"
)
PROSE = {"en": ENGLISH, "fi": FINNISH, "de": GERMAN, "ru": RUSSIAN, "zh": CHINESE}
